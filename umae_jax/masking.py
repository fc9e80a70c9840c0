"""Uniform masking (SPEC 2; arXiv 2205.10063, section 3.2): pure functions of arrays and keys.

An image is a grid of *mask units*; a *cell* is a 2 x 2 group of units. Uniform sampling keeps one unit per cell, named
by its *offset* 0..3 (row-major: dy = offset // 2, dx = offset % 2). An image thus splits into four *compact maps* of
half its height and width: one holds the sampled units side by side, three hold the other units.

Masks apply to any map with k x k elements per unit, of any dtype: pixels, patches, or units (k = 1). They select one of
four units by `where`, which is dense and cheap on TPU; a gather is not.
"""

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Mask(Protocol):
    """The sampled quarter of each image's units, some of them hidden from the encoder by secondary masking."""

    @property
    def hidden(self) -> jax.Array:
        """Return bool [B, cell rows, cell columns]: True where the content of a sampled unit is hidden."""

    def compact(self, x: jax.Array) -> jax.Array:
        """Return the sampled units side by side: [B or 1, H, W, C] -> [B, H / 2, W / 2, C]."""

    def masked_units(self, x: jax.Array) -> jax.Array:
        """Return the units that were not sampled: [B or 1, H, W, C] -> [B, 3, H / 2, W / 2, C]."""

    def assemble(self, sampled: jax.Array, masked: jax.Array) -> jax.Array:
        """Invert `compact` and `masked_units`: [B, h, w, C], [B, 3, h, w, C] (or broadcastable) -> [B, 2 h, 2 w, C]."""


class UniformMask(NamedTuple):
    """One sampled unit per cell; `masked_units` returns the other three of each cell in row-major order.

    Attributes:
        offset: int32 [B, cell rows, cell columns], the sampled unit of each cell, 0..3.
        hidden: bool [B, cell rows, cell columns], see `Mask`.
    """

    offset: jax.Array
    hidden: jax.Array

    def compact(self, x: jax.Array) -> jax.Array:
        """See `Mask.compact`."""
        units, offset = _four_units(x, self.offset.shape[1:]), _per_cell(self.offset)
        upper = jnp.where(offset == 0, units[0], units[1])
        lower = jnp.where(offset == 2, units[2], units[3])
        return _flat(jnp.where(offset < 2, upper, lower))

    def masked_units(self, x: jax.Array) -> jax.Array:
        """See `Mask.masked_units`."""
        units, offset = _four_units(x, self.offset.shape[1:]), _per_cell(self.offset)
        # The j-th unit not sampled is unit j if that lies before the sampled unit, else unit j + 1.
        return jnp.stack([_flat(jnp.where(offset <= j, units[j + 1], units[j])) for j in range(3)], axis=1)

    def assemble(self, sampled: jax.Array, masked: jax.Array) -> jax.Array:
        """See `Mask.assemble`."""
        batch, height, width, channels = sampled.shape
        rows, columns = self.offset.shape[1:]
        k = height // rows
        split = (batch, rows, k, columns, k, channels)
        masked = jnp.broadcast_to(masked, (batch, 3, height, width, channels))
        others = [masked[:, j].reshape(split) for j in range(3)]
        sampled, offset = sampled.reshape(split), _per_cell(self.offset)
        units = []
        for place in range(4):  # before the sampled unit comes the unit `place` of the others, after it `place - 1`
            before, after = others[min(place, 2)], others[max(place - 1, 0)]
            units.append(jnp.where(offset == place, sampled, jnp.where(offset > place, before, after)))
        whole = jnp.stack(units, axis=1).reshape(batch, 2, 2, *split[1:])
        # [B, dy, dx, rows, k, columns, k, C] -> [B, rows, dy, k, columns, dx, k, C]
        return whole.transpose(0, 3, 1, 4, 5, 2, 6, 7).reshape(batch, 2 * height, 2 * width, channels)


def visible_count(cells: tuple[int, int], secondary_ratio: float) -> int:
    """Return the number of visible sampled units per image: floor(cells * (1 - ratio)); ValueError outside [0, 1)."""
    if not 0 <= secondary_ratio < 1:
        raise ValueError(f"secondary_ratio must lie in [0, 1), not {secondary_ratio}")
    return math.floor(cells[0] * cells[1] * (1 - secondary_ratio))


def sample_uniform_mask(key: jax.Array, batch: int, cells: tuple[int, int], secondary_ratio: float) -> UniformMask:
    """Draw a uniform mask for each image.

    Args:
        key: one key per image, [batch], or a single key; image i then uses `fold_in(key, i)`.
        batch: number of images.
        cells: rows and columns of the grid of cells, (Gh / 2, Gw / 2).
        secondary_ratio: fraction of the sampled units to hide, in [0, 1).

    Raises:
        ValueError: if the ratio lies outside [0, 1), or the number of keys is neither 1 nor `batch`.
    """

    def sample_one(image_key: jax.Array) -> UniformMask:
        offset_key, hidden_key = jax.random.split(image_key)
        offset = jax.random.randint(offset_key, cells, 0, 4, dtype=jnp.int32)
        return UniformMask(offset, sample_hidden(hidden_key, cells, secondary_ratio))

    return jax.vmap(sample_one)(image_keys(key, batch))


def image_keys(key: jax.Array, batch: int) -> jax.Array:
    """Return one key per image, [B]; fold a single key with the index of each image. ValueError for another number."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))
    if key.shape != (batch,):
        raise ValueError(f"key: expected one key or {batch} keys, one per image, not shape {key.shape}")
    return key


def sample_hidden(key: jax.Array, cells: tuple[int, int], secondary_ratio: float) -> jax.Array:
    """Draw the units that secondary masking hides in one image: bool [rows, columns]."""
    rank = jax.random.permutation(key, cells[0] * cells[1])  # a uniform choice of fixed size without replacement
    return (rank >= visible_count(cells, secondary_ratio)).reshape(cells)


def unit_side(shape: tuple[int, ...], cells: tuple[int, ...]) -> int:
    """Return a unit's side in elements of a map [B, H, W, ...]; ValueError if the map has no square units."""
    height, width = shape[1:3]
    side = height // (2 * cells[0])
    if (2 * cells[0] * side, 2 * cells[1] * side) != (height, width) or side == 0:
        raise ValueError(f"a {height} x {width} map does not divide into square units of {cells[0]} x {cells[1]} cells")
    return side


def _four_units(x: jax.Array, cells: tuple[int, ...]) -> list[jax.Array]:
    """Split [B, H, W, C] into four maps [B, rows, k, columns, k, C], one per offset."""
    k = unit_side(x.shape, cells)
    x = x.reshape(x.shape[0], cells[0], 2, k, cells[1], 2, k, -1)
    return [x[:, :, dy, :, :, dx] for dy in (0, 1) for dx in (0, 1)]


def _per_cell(values: jax.Array) -> jax.Array:
    """Reshape [B, rows, columns] to [B, rows, 1, columns, 1, 1], which broadcasts over the maps of `_four_units`."""
    return values[:, :, None, :, None, None]


def _flat(x: jax.Array) -> jax.Array:
    """Reshape [B, rows, k, columns, k, C] to [B, rows * k, columns * k, C]."""
    batch, rows, k, columns, _, channels = x.shape
    return x.reshape(batch, rows * k, columns * k, channels)


def expand(values: jax.Array, side: int) -> jax.Array:
    """Repeat one value per unit over the unit's side x side elements: [B, rows, columns] -> [B, rows k, columns k]."""
    return jnp.repeat(jnp.repeat(values, side, axis=1), side, axis=2)
