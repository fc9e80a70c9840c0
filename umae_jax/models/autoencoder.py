"""The masked autoencoder (SPEC 6): encode the sampled quarter, decode lightly, predict the rest."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import nearest_multiples, require
from umae_jax.masking import Mask
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, Features
from umae_jax.models.masked import MaskedImageModel
from umae_jax.models.reference_order import in_reference_order
from umae_jax.patches import pixel_shuffle
from umae_jax.positions import sincos_table

DECODER_MLP_RATIO = 4


class MaskedAutoencoder(MaskedImageModel):
    """Masked autoencoder with any encoder: UM-MAE, or MAE with random sampling.

    Args:
        reference_order: give sampled units the reference's wrong decoder positions (SPEC 6).
        shared: arguments of `MaskedImageModel`. Without secondary masking the encoder has no mask token.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        reference_order: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        **shared: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(encoder, compact=True, **shared)
        require(decoder_depth > 0, f"model.decoder_depth must be at least 1, not {decoder_depth}")
        message = f"model.decoder_width: {decoder_width} is not a multiple of 4, which its position table needs"
        require(decoder_width % 4 == 0, f"{message}; choose {nearest_multiples(decoder_width, 4)}")
        message = f"model.decoder_heads: {decoder_heads} heads do not divide the decoder's width {decoder_width}"
        require(decoder_heads > 0 and decoder_width % decoder_heads == 0, message)
        message = "model.reference_order: the reference's ViT has the right order already; set it to False"
        require(not reference_order or encoder.stride > encoder.patch, message)
        self.reference_order = reference_order
        self.dtype = dtype
        self.mask_token = layers.token(encoder.widths[0], rngs=rngs) if self.secondary_ratio else None
        width = self.decoder_factor**2 * decoder_width
        self.decoder_embed = layers.linear(encoder.widths[-1], width, dtype=dtype, rngs=rngs)
        self.decoder_mask_token = layers.token(decoder_width, rngs=rngs)
        self.decoder_blocks = nnx.List(
            layers.TransformerBlock(decoder_width, decoder_heads, DECODER_MLP_RATIO, dtype=dtype, rngs=rngs)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = layers.layer_norm(decoder_width, rngs=rngs)
        self.decoder_prediction = layers.linear(decoder_width, self.unit**2 * encoder.channels, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
        """See `MaskedImageModel.__call__`; the loss is the mean squared error."""
        prediction = self.decode(self.encode(images, mask), mask)
        with jax.named_scope("loss"):
            return jnp.mean(jnp.square(prediction - self.target(images, mask))), prediction

    def encode(self, images: jax.Array, mask: Mask) -> Features:
        """Encode the sampled units: [B, H, W, C] -> the encoder's features of the compact grid.

        Units that were not sampled are dropped before the patch embedding.
        """
        with jax.named_scope("images"):
            sampled = mask.compact(images)
        with jax.named_scope("encoder"):
            hidden = () if self.mask_token is None else (mask.hidden, self.mask_token[...])
            return self.encoder(self.encoder.embed(sampled, *hidden), mask)

    def decoder_tokens(self, features: Features, mask: Mask) -> jax.Array:
        """Return the decoder's input [B, N, D]: the class token if any, the n sampled units, the other 3 n units."""
        table = sincos_table(self.decoder_mask_token.shape[-1], (2 * self.cells[0], 2 * self.cells[1]))
        positions = jnp.asarray(table)[None]  # [1, unit rows, unit columns, D]
        sampled = pixel_shuffle(self.decoder_embed(features.maps[-1]), self.decoder_factor)
        compact = in_reference_order if self.reference_order else type(mask).compact
        sampled = sampled + compact(mask, positions).astype(self.dtype)  # [B, cell rows, cell columns, D]
        token = self.decoder_mask_token[...][None, None]
        masked = (token + mask.masked_units(positions)).astype(self.dtype)  # [B, 3, cell rows, cell columns, D]
        flat = (sampled.shape[0], -1, sampled.shape[-1])
        tokens = [sampled.reshape(flat), masked.reshape(flat)]
        if features.class_token is not None:  # its position embedding is zero
            tokens.insert(0, self.decoder_embed(features.class_token))
        return jnp.concatenate(tokens, axis=1)

    def decode(self, features: Features, mask: Mask) -> jax.Array:
        """Predict the units that were not sampled: float32 [B, 3, cell rows, cell columns, unit * unit * C].

        The last block's queries, its norm and the prediction are computed for these units only.
        """
        with jax.named_scope("decoder"):
            x = self.decoder_tokens(features, mask)
            for block in self.decoder_blocks[:-1]:
                x = block(x)
            x = self.decoder_blocks[-1](x, first_query=x.shape[1] - 3 * self.cells[0] * self.cells[1])
            x = self.decoder_prediction(self.decoder_norm(x)).astype(jnp.float32)
            return x.reshape(x.shape[0], 3, *self.cells, -1)
