"""SimMIM (SPEC 7), the baseline: the encoder sees the whole image, with a token for every patch that is masked."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.masking import Mask, expand
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, Normalize, already_normalized
from umae_jax.models.masked import MaskedImageModel
from umae_jax.patches import pixel_shuffle


class SimMIM(MaskedImageModel):
    """A random three quarters of the units are masked and predicted by one linear layer; the loss is L1.

    Args:
        dtype: what the linear layer computes in.
        And those of `MaskedImageModel` but for the masking.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_size: tuple[int, int],
        decoder_factor: int,
        norm_pix_loss: bool,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            encoder,
            image_size=image_size,
            decoder_factor=decoder_factor,
            sampling="random",
            secondary_ratio=0.0,
            norm_pix_loss=norm_pix_loss,
            compact=False,
        )
        grid = (image_size[0] // encoder.patch, image_size[1] // encoder.patch)
        encoder.check_grid(grid, compact=False)
        self.mask_token = layers.token(encoder.widths[0], rngs=rngs)
        outputs = decoder_factor**2 * self.unit**2 * encoder.channels
        self.decoder_prediction = layers.linear(encoder.widths[-1], outputs, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized
    ) -> tuple[jax.Array, jax.Array]:
        """See `MaskedImageModel.__call__`."""
        prediction = mask.masked_units(self.predict(self.encode(images, mask, normalize)))
        with jax.named_scope("loss"):
            return jnp.mean(jnp.abs(prediction - self.target(images, mask, normalize))), prediction

    def encode(self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized) -> jax.Array:
        """Encode the image, its masked patches replaced: [B, H, W, C] -> the encoder's last map [B, h, w, C']."""
        sampled, masked = (jnp.full((images.shape[0], *self.cells, 1), value) for value in (False, True))
        masked = mask.assemble(sampled, masked[:, None])[..., 0]  # bool [B, unit rows, unit columns]
        with jax.named_scope("encoder"):
            tokens = self.encoder.embed(images, normalize=normalize)
            masked = expand(masked, self.unit // self.encoder.patch)[..., None]
            tokens = jnp.where(masked, self.mask_token[...].astype(tokens.dtype)[None], tokens)
            return self.encoder(tokens).maps[-1]

    def predict(self, latent: jax.Array) -> jax.Array:
        """The pixels of every unit: [B, h, w, C'] -> float32 [B, unit rows, unit columns, unit * unit * C]."""
        with jax.named_scope("decoder"):
            return pixel_shuffle(self.decoder_prediction(latent), self.decoder_factor).astype(jnp.float32)
