"""The masked autoencoder (SPEC 6): encode the sampled quarter, decode lightly, compare with all the rest."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import nearest_multiples, require
from umae_jax.masking import Mask, UniformMask
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, Features, Normalize, already_normalized
from umae_jax.models.masked import MaskedImageModel
from umae_jax.patches import pixel_shuffle
from umae_jax.positions import sincos_table

DECODER_MLP_RATIO = 4


class MaskedAutoencoder(MaskedImageModel):
    """Masked autoencoder around any encoder: UM-MAE, or MAE with random sampling.

    Args:
        decoder_width, decoder_depth, decoder_heads: the decoder's blocks.
        reference_order: give sampled units the reference's decoder positions, not their own (the fault in SPEC 6).
        dtype: what the linear layers compute in.
        And those of `MaskedImageModel`; without secondary masking there is no mask token in the encoder.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_size: tuple[int, int],
        sampling: str = "uniform",
        secondary_ratio: float,
        decoder_factor: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        norm_pix_loss: bool,
        reference_order: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            encoder,
            image_size=image_size,
            decoder_factor=decoder_factor,
            sampling=sampling,
            secondary_ratio=secondary_ratio,
            norm_pix_loss=norm_pix_loss,
            compact=True,
        )
        require(decoder_depth > 0, f"model.decoder_depth must be at least 1, not {decoder_depth}")
        require(
            decoder_width % 4 == 0,
            f"model.decoder_width: {decoder_width} is not a multiple of 4, which its position table needs; "
            f"choose {nearest_multiples(decoder_width, 4)}",
        )
        require(
            decoder_heads > 0 and decoder_width % decoder_heads == 0,
            f"model.decoder_heads: {decoder_heads} heads do not divide the decoder's width {decoder_width}",
        )
        require(
            not reference_order or encoder.stride > encoder.patch,
            "model.reference_order: the reference's ViT has the right order already; set it to False",
        )
        encoder.check_grid((image_size[0] // (2 * encoder.patch), image_size[1] // (2 * encoder.patch)), compact=True)
        self.reference_order = reference_order
        self.dtype = dtype
        self.mask_token = layers.token(encoder.widths[0], rngs=rngs) if secondary_ratio else None
        self.decoder_embed = layers.linear(
            encoder.widths[-1], decoder_factor**2 * decoder_width, dtype=dtype, rngs=rngs
        )
        self.decoder_mask_token = layers.token(decoder_width, rngs=rngs)
        self.decoder_blocks = nnx.List(
            layers.TransformerBlock(decoder_width, decoder_heads, DECODER_MLP_RATIO, dtype=dtype, rngs=rngs)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = layers.layer_norm(decoder_width, rngs=rngs)
        self.decoder_prediction = layers.linear(decoder_width, self.unit**2 * encoder.channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized
    ) -> tuple[jax.Array, jax.Array]:
        """See `MaskedImageModel.__call__`; the loss is the mean squared error."""
        prediction = self.decode(self.encode(images, mask, normalize), mask)
        with jax.named_scope("loss"):
            return jnp.mean(jnp.square(prediction - self.target(images, mask, normalize))), prediction

    def encode(self, images: jax.Array, mask: Mask, normalize: Normalize = already_normalized) -> Features:
        """Encode the sampled units: [B, H, W, C] -> the encoder's features of the compact grid.

        Units are dropped before the patch embedding: nothing that was not sampled is ever computed.
        """
        with jax.named_scope("images"):
            sampled = mask.compact(images)
        token = None if self.mask_token is None else self.mask_token[...]
        with jax.named_scope("encoder"):
            tokens = self.encoder.embed(sampled, None if token is None else mask.hidden, token, normalize)
            return self.encoder(tokens, mask)

    def decoder_tokens(self, features: Features, mask: Mask) -> jax.Array:
        """What enters the decoder: the class token if there is one, the n sampled units, the other 3 n: [B, N, D]."""
        table = sincos_table(self.decoder_mask_token.shape[-1], (2 * self.cells[0], 2 * self.cells[1]))
        positions = jnp.asarray(table)[None]  # [1, unit rows, unit columns, D]
        sampled = pixel_shuffle(self.decoder_embed(features.maps[-1]), self.decoder_factor)
        sampled = sampled + self._sampled_positions(positions, mask).astype(self.dtype)  # [B, rows, columns, D]
        token = self.decoder_mask_token[...][None, None]
        masked = (token + mask.masked_units(positions)).astype(self.dtype)  # [B, 3, cell rows, cell columns, D]
        flat = (sampled.shape[0], -1, sampled.shape[-1])
        tokens = [sampled.reshape(flat), masked.reshape(flat)]
        if features.class_token is not None:  # its position embedding is zero
            tokens.insert(0, self.decoder_embed(features.class_token))
        return jnp.concatenate(tokens, axis=1)

    def decode(self, features: Features, mask: Mask) -> jax.Array:
        """Predict the units that were not sampled: float32 [B, 3, cell rows, cell columns, unit * unit * C].

        The last block needs queries only where the loss looks; norm and prediction likewise.
        """
        with jax.named_scope("decoder"):
            x = self.decoder_tokens(features, mask)
            for block in self.decoder_blocks[:-1]:
                x = block(x)
            x = self.decoder_blocks[-1](x, first_query=x.shape[1] - 3 * self.cells[0] * self.cells[1])
            x = self.decoder_prediction(self.decoder_norm(x)).astype(jnp.float32)
            return x.reshape(x.shape[0], 3, *self.cells, -1)

    def _sampled_positions(self, positions: jax.Array, mask: Mask) -> jax.Array:
        """Position embeddings of the sampled units: [1, unit rows, unit columns, D] -> [B, rows, columns, D]."""
        if not self.reference_order or not isinstance(mask, UniformMask):
            return mask.compact(positions)
        rows, columns = self.cells
        row = 2 * np.arange(rows)[None, :, None] + mask.offset // 2
        column = 2 * np.arange(columns)[None, None, :] + mask.offset % 2
        # The reference hands out the positions of the sampled units in row-major order of the full grid.
        units = jnp.sort((row * 2 * columns + column).reshape(mask.offset.shape[0], -1), axis=-1)
        return positions.reshape(-1, positions.shape[-1])[units].reshape(*mask.offset.shape, -1)
