"""SimMIM (SPEC 7), the baseline: the encoder sees the whole image, with a mask token for every masked patch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.masking import Mask, expand
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder
from umae_jax.models.masked import MaskedImageModel
from umae_jax.patches import pixel_shuffle


class SimMIM(MaskedImageModel):
    """Masks a random three quarters of the units and predicts them with one linear layer and an L1 loss.

    `shared` are the arguments image_size, decoder_factor and norm_pix_loss of `MaskedImageModel`.
    """

    def __init__(self, encoder: Encoder, *, dtype: DTypeLike, rngs: nnx.Rngs, **shared: Any) -> None:  # noqa: ANN401
        super().__init__(encoder, sampling="random", secondary_ratio=0.0, compact=False, **shared)
        self.mask_token = layers.token(encoder.widths[0], rngs=rngs)
        outputs = self.decoder_factor**2 * self.unit**2 * encoder.channels
        self.decoder_prediction = layers.linear(encoder.widths[-1], outputs, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        """See `MaskedImageModel.__call__`."""
        prediction = mask.masked_units(self.predict(self.encode(images, mask)))
        with jax.named_scope("loss"):
            return jnp.mean(jnp.abs(prediction - self.target(images, mask))), prediction

    def encode(self, images: jax.Array, mask: Mask) -> jax.Array:
        """Replace the masked patches and encode the image: [B, H, W, C] -> the encoder's last map [B, h, w, C']."""
        sampled, masked = (jnp.full((images.shape[0], *self.cells, 1), value) for value in (False, True))
        masked = mask.assemble(sampled, masked[:, None])[..., 0]  # bool [B, unit rows, unit columns]
        with jax.named_scope("encoder"):
            tokens = self.encoder.embed(images)
            masked = expand(masked, self.unit // self.encoder.patch)[..., None]
            tokens = jnp.where(masked, self.mask_token[...].astype(tokens.dtype)[None], tokens)
            return self.encoder(tokens).maps[-1]

    def predict(self, latent: jax.Array) -> jax.Array:
        """Predict the pixels of every unit: [B, h, w, C'] -> float32 [B, unit rows, unit columns, unit * unit * C]."""
        with jax.named_scope("decoder"):
            return pixel_shuffle(self.decoder_prediction(latent), self.decoder_factor).astype(jnp.float32)
