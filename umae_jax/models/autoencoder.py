"""The masked autoencoder (SPEC 6): encode the sampled quarter, decode lightly, compare with all the rest."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import nearest_multiples, require
from umae_jax.masking import UniformMask, compact, masked_units, visible_count
from umae_jax.models import layers
from umae_jax.models.swin import Swin
from umae_jax.patches import patchify, pixel_shuffle
from umae_jax.positions import sincos_table

DECODER_MLP_RATIO = 4


class MaskedAutoencoder(nnx.Module):
    """Uniform-masked autoencoder around an encoder of pyramid shape.

    Args:
        encoder: what encodes the compact grid.
        image_size: height and width in pixels.
        channels: channels of the image.
        secondary_ratio: the share of sampled units that secondary masking hides; 0 for none, then there is no token.
        decoder_factor: how many mask units lie along the side of one encoder token (r of SPEC 6).
        decoder_width, decoder_depth, decoder_heads: the decoder's blocks.
        normalize_target: predict each unit's pixels normalised by the unit's own mean and variance.
        reference_order: give sampled units the reference's decoder positions, not their own (the fault in SPEC 6).
        dtype: what the linear layers compute in.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        encoder: Swin,
        *,
        image_size: tuple[int, int],
        channels: int,
        secondary_ratio: float,
        decoder_factor: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        normalize_target: bool,
        reference_order: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        require(0 <= secondary_ratio < 1, f"model.secondary_ratio must lie in [0, 1), not {secondary_ratio}")
        most = encoder.stride // encoder.patch
        require(
            decoder_factor > 0 and most % decoder_factor == 0,
            f"model.decoder_factor: {decoder_factor} does not divide {most}, the patches along one output token; "
            f"choose a divisor of {most}",
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
        # Half the image must be whole output tokens.
        for name, size in zip(("height", "width"), image_size, strict=True):
            require(
                size > 0 and size % (2 * encoder.stride) == 0,
                f"image_size: the {name} {size} is not a multiple of {2 * encoder.stride} "
                f"(twice the patch, doubled by every merge); choose {nearest_multiples(size, 2 * encoder.stride)}",
            )
        self.unit = encoder.stride // decoder_factor
        self.cells = (image_size[0] // (2 * self.unit), image_size[1] // (2 * self.unit))
        encoder.check_grid((image_size[0] // (2 * encoder.patch), image_size[1] // (2 * encoder.patch)))
        units = self.cells[0] * self.cells[1]
        require(
            visible_count(self.cells, secondary_ratio) > 0,
            f"model.secondary_ratio: {secondary_ratio} hides all {units} sampled units; lower it",
        )
        self.encoder = encoder
        self.secondary_ratio = secondary_ratio
        self.decoder_factor = decoder_factor
        self.normalize_target = normalize_target
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
        self.decoder_prediction = layers.linear(decoder_width, self.unit**2 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, mask: UniformMask) -> tuple[jax.Array, jax.Array]:
        """Loss and prediction of a batch.

        Args:
            images: float32 [B, H, W, C], normalised.
            mask: over the image's cells.

        Returns:
            The loss, a float32 scalar: mean squared error over the units that were not sampled; and the prediction of
            those units, float32 [B, 3, cell rows, cell columns, unit * unit * C], in the order of `masked_units`.
        """
        latent = self.encode(images, mask)
        prediction = self.decode(latent, mask.offset)
        return jnp.mean(jnp.square(prediction - self.target(images, mask.offset))), prediction

    def encode(self, images: jax.Array, mask: UniformMask) -> jax.Array:
        """Encode the sampled units: [B, H, W, C] -> the encoder's last map [B, h, w, C'], float32.

        Units are dropped before the patch embedding: nothing that was not sampled is ever computed.
        """
        sampled = compact(images, mask.offset)
        token = None if self.mask_token is None else self.mask_token[...]
        with jax.named_scope("encoder"):
            tokens = self.encoder.embed(sampled, None if token is None else mask.hidden, token)
            return self.encoder(tokens, mask.offset)[-1]

    def decoder_tokens(self, latent: jax.Array, offset: jax.Array) -> jax.Array:
        """What enters the decoder, the n sampled units and then the other 3 n: [B, h, w, C'] -> [B, 4 n, D]."""
        table = jnp.asarray(sincos_table(self.decoder_mask_token.shape[-1], (2 * self.cells[0], 2 * self.cells[1])))
        sampled = pixel_shuffle(self.decoder_embed(latent), self.decoder_factor)  # [B, cell rows, cell columns, D]
        sampled = sampled + self._sampled_positions(table, offset).astype(self.dtype)
        token = self.decoder_mask_token[...][None, None]
        masked = (token + masked_units(table[None], offset)).astype(self.dtype)  # [B, 3, cell rows, cell columns, D]
        flat = (latent.shape[0], -1, table.shape[-1])
        return jnp.concatenate([sampled.reshape(flat), masked.reshape(flat)], axis=1)

    def decode(self, latent: jax.Array, offset: jax.Array) -> jax.Array:
        """Predict the units that were not sampled: float32 [B, 3, cell rows, cell columns, unit * unit * C].

        The last block needs queries only where the loss looks; norm and prediction likewise.
        """
        with jax.named_scope("decoder"):
            x = self.decoder_tokens(latent, offset)
            for block in self.decoder_blocks[:-1]:
                x = block(x)
            x = self.decoder_blocks[-1](x, first_query=self.cells[0] * self.cells[1])
            x = self.decoder_prediction(self.decoder_norm(x)).astype(jnp.float32)
            return x.reshape(x.shape[0], 3, *self.cells, -1)

    def target(self, images: jax.Array, offset: jax.Array) -> jax.Array:
        """The pixels of the units that were not sampled, ordered (row, column, channel), shaped as `decode`'s."""
        target = self.masked_pixels(images, offset)
        if self.normalize_target:
            mean = target.mean(axis=-1, keepdims=True)
            variance = target.var(axis=-1, keepdims=True, ddof=1)  # the reference's is the unbiased one
            target = (target - mean) / jnp.sqrt(variance + 1e-6)
        return target

    def masked_pixels(self, images: jax.Array, offset: jax.Array) -> jax.Array:
        """The units that were not sampled, as they are: [B, H, W, C] -> [B, 3, cell rows, cell columns, pixels]."""
        masked = masked_units(images, offset)  # [B, 3, H / 2, W / 2, C]
        units = patchify(masked.reshape(-1, *masked.shape[2:]), self.unit)
        return units.reshape(*masked.shape[:2], *units.shape[1:])

    def _sampled_positions(self, table: jax.Array, offset: jax.Array) -> jax.Array:
        """Position embeddings of the sampled units: [Gh, Gw, D] -> [B, cell rows, cell columns, D]."""
        if not self.reference_order:
            return compact(table[None], offset)
        rows, columns = self.cells
        row = 2 * np.arange(rows)[None, :, None] + offset // 2
        column = 2 * np.arange(columns)[None, None, :] + offset % 2
        # The reference hands out the positions of the sampled units in row-major order of the full grid.
        units = jnp.sort((row * 2 * columns + column).reshape(offset.shape[0], -1), axis=-1)
        return table.reshape(-1, table.shape[-1])[units].reshape(*offset.shape, -1)
