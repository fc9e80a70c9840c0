"""Random masking (SPEC 2), for the ViT and SimMIM: any quarter of an image's units, in any order.

The units fill four compact maps, as in uniform masking, so models treat both kinds of masks alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from umae_jax.masking import image_keys, sample_hidden, unit_side
from umae_jax.patches import patchify, unpatchify


class RandomMask(NamedTuple):
    """A mask of units in any order, for encoders whose tokens need no neighbours.

    Attributes:
        order: int32 [B, 4, rows, columns], the unit (row-major index in the full grid) at each place of the four
            compact maps. The first map holds the sampled units.
        hidden: bool [B, rows, columns], see `masking.Mask`.
    """

    order: jax.Array
    hidden: jax.Array

    def compact(self, x: jax.Array) -> jax.Array:
        """See `masking.Mask.compact`."""
        return _gather_units(x, self.order[:, :1], unit_side(x.shape, self.hidden.shape[1:]))[:, 0]

    def masked_units(self, x: jax.Array) -> jax.Array:
        """See `masking.Mask.masked_units`."""
        return _gather_units(x, self.order[:, 1:], unit_side(x.shape, self.hidden.shape[1:]))

    def assemble(self, sampled: jax.Array, masked: jax.Array) -> jax.Array:
        """See `masking.Mask.assemble`."""
        batch, height, width, channels = sampled.shape
        rows, columns = self.order.shape[2:]
        masked = jnp.broadcast_to(masked, (batch, 3, height, width, channels))
        # Stacked vertically, the four maps are 4 * rows x columns units; the full grid has 2 * rows x 2 * columns.
        maps = jnp.concatenate([sampled[:, None], masked], axis=1).reshape(batch, 4 * height, width, channels)
        places = jnp.argsort(self.order.reshape(batch, -1), axis=-1).reshape(batch, 1, 2 * rows, 2 * columns)
        return _gather_units(maps, places, height // rows)[:, 0]


def sample_random_mask(key: jax.Array, batch: int, cells: tuple[int, int], secondary_ratio: float) -> RandomMask:
    """Draw a random mask for each image; arguments and errors are those of `masking.sample_uniform_mask`."""

    def sample_one(image_key: jax.Array) -> RandomMask:
        order_key, hidden_key = jax.random.split(image_key)
        order = jax.random.permutation(order_key, jnp.arange(4 * cells[0] * cells[1], dtype=jnp.int32))
        return RandomMask(order.reshape(4, *cells), sample_hidden(hidden_key, cells, secondary_ratio))

    return jax.vmap(sample_one)(image_keys(key, batch))


def _gather_units(x: jax.Array, order: jax.Array, side: int) -> jax.Array:
    """Gather units of `side` x `side` elements: [B or 1, H, W, C] -> [B, m, rows * side, columns * side, C].

    `order`, [B, m, rows, columns], holds row-major indices of the units of `x`.
    """
    batch, m, rows, columns = order.shape
    units = patchify(x, side)
    units = units.reshape(x.shape[0], -1, units.shape[-1])
    units = jnp.broadcast_to(units, (batch, *units.shape[1:]))
    gathered = jnp.take_along_axis(units, order.reshape(batch, -1, 1), axis=1)
    maps = unpatchify(gathered.reshape(batch * m, rows, columns, -1), side)
    return maps.reshape(batch, m, *maps.shape[1:])
