"""Uniform masking (SPEC 2; arXiv 2205.10063, section 3.2): pure functions of arrays and keys.

The words, once: an image is a grid of *mask units*; a *cell* is a 2 x 2 group of them; uniform sampling keeps
one unit a cell, named by its *offset* 0..3 (row-major, so dy = offset // 2, dx = offset % 2). Seen this way an
image is four *compact maps* of half its height and width: the sampled units laid side by side (`compact`) and three
more with the units that were not sampled (`masked_units`). `assemble` puts the four together again.

Random sampling, which keeps any quarter of the units, fits the same four maps, filled in any order: both kinds of mask
answer to `compact`, `masked_units` and `assemble`, and nobody else needs to know which it is.

Every function works on any map whose height and width are the unit grid times some side k: pixels (k = pixels a unit),
patches (k = patches a unit) or units (k = 1). Under uniform masking, picking one of four by `where` rather than by a
gather keeps all of it dense and cheap on TPU, and works on uint8 pixels as well.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class UniformMask(NamedTuple):
    """Which unit of each cell is sampled, and which of those are hidden from the encoder.

    Attributes:
        offset: int32 [batch, cell rows, cell columns], the sampled unit of each cell, 0..3.
        hidden: bool [batch, cell rows, cell columns], True where secondary masking hides the sampled unit's content.
    """

    offset: jax.Array
    hidden: jax.Array

    def compact(self, x: jax.Array) -> jax.Array:
        """The sampled units side by side: [B or 1, H, W, C] -> [B, H / 2, W / 2, C]."""
        return compact(x, self.offset)

    def masked_units(self, x: jax.Array) -> jax.Array:
        """The units that were not sampled: [B or 1, H, W, C] -> [B, 3, H / 2, W / 2, C]."""
        return masked_units(x, self.offset)

    def assemble(self, sampled: jax.Array, masked: jax.Array) -> jax.Array:
        """The two above put together again: [B, h, w, C] and [B, 3, h, w, C] -> [B, 2 h, 2 w, C]."""
        return assemble(sampled, masked, self.offset)


class RandomMask(NamedTuple):
    """Any quarter of an image's units, in any order (random sampling, SPEC 2): for models that need no neighbourhood.

    Attributes:
        order: int32 [batch, 4, rows, columns], which unit of the full grid, counted row by row, lies at each place of
            the four compact maps; the first map holds the sampled units.
        hidden: bool [batch, rows, columns], True where secondary masking hides the sampled unit's content.
    """

    order: jax.Array
    hidden: jax.Array

    def compact(self, x: jax.Array) -> jax.Array:
        """The sampled units side by side: [B or 1, H, W, C] -> [B, H / 2, W / 2, C]."""
        return _gather_units(x, self.order[:, :1])[:, 0]

    def masked_units(self, x: jax.Array) -> jax.Array:
        """The units that were not sampled: [B or 1, H, W, C] -> [B, 3, H / 2, W / 2, C]."""
        return _gather_units(x, self.order[:, 1:])

    def assemble(self, sampled: jax.Array, masked: jax.Array) -> jax.Array:
        """The two above put together again: [B, h, w, C] and [B, 3, h, w, C] -> [B, 2 h, 2 w, C].

        `masked` may have any shape that broadcasts.
        """
        batch, height, width, channels = sampled.shape
        rows, columns = self.order.shape[2:]
        masked = jnp.broadcast_to(masked, (batch, 3, height, width, channels))
        # The four maps, one above the other, are 4 * rows x columns units, to be put into 2 * rows x 2 * columns.
        maps = jnp.concatenate([sampled[:, None], masked], axis=1).reshape(batch, 4 * height, width, channels)
        places = jnp.argsort(self.order.reshape(batch, -1), axis=-1).reshape(batch, 1, 2 * rows, 2 * columns)
        return _gather_units(maps, places, height // rows)[:, 0]


Mask = UniformMask | RandomMask


def visible_count(cells: tuple[int, int], secondary_ratio: float) -> int:
    """How many of an image's sampled units stay visible: floor(n * (1 - ratio)), n = one a cell."""
    if not 0 <= secondary_ratio < 1:
        raise ValueError(f"the secondary masking ratio must lie in [0, 1), not {secondary_ratio}")
    return math.floor(cells[0] * cells[1] * (1 - secondary_ratio))


def sample_uniform_mask(key: jax.Array, batch: int, cells: tuple[int, int], secondary_ratio: float) -> UniformMask:
    """Draw a uniform mask for each image.

    Args:
        key: one key, from which image i takes `fold_in(key, i)`, or an array of `batch` keys, one an image.
        batch: number of images.
        cells: rows and columns of the grid of cells, (Gh / 2, Gw / 2).
        secondary_ratio: the share of the sampled units to hide, in [0, 1).

    Raises:
        ValueError: if the ratio lies outside [0, 1), or there is not one key an image.
    """

    def sample_one(image_key: jax.Array) -> UniformMask:
        offset_key, hidden_key = jax.random.split(image_key)
        offset = jax.random.randint(offset_key, cells, 0, 4, dtype=jnp.int32)
        return UniformMask(offset, _sample_hidden(hidden_key, cells, secondary_ratio))

    return jax.vmap(sample_one)(_image_keys(key, batch))


def sample_random_mask(key: jax.Array, batch: int, cells: tuple[int, int], secondary_ratio: float) -> RandomMask:
    """Draw a quarter of each image's units at random; arguments and errors are those of `sample_uniform_mask`."""

    def sample_one(image_key: jax.Array) -> RandomMask:
        order_key, hidden_key = jax.random.split(image_key)
        order = jax.random.permutation(order_key, jnp.arange(4 * cells[0] * cells[1], dtype=jnp.int32))
        return RandomMask(order.reshape(4, *cells), _sample_hidden(hidden_key, cells, secondary_ratio))

    return jax.vmap(sample_one)(_image_keys(key, batch))


def _image_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key an image, [batch]: folded from one key, or given."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))
    if key.shape != (batch,):
        raise ValueError(f"expected one key, or {batch} of them, one an image; got keys of shape {key.shape}")
    return key


def _sample_hidden(key: jax.Array, cells: tuple[int, int], secondary_ratio: float) -> jax.Array:
    """Secondary masking of one image: bool [rows, columns]."""
    # A random permutation's places from `visible` on are a uniform choice without replacement, of fixed size.
    rank = jax.random.permutation(key, cells[0] * cells[1])
    return (rank >= visible_count(cells, secondary_ratio)).reshape(cells)


def unit_side(shape: tuple[int, ...], cells: tuple[int, ...]) -> int:
    """Side k of a unit, in elements, of a map of `shape` [batch, height, width, ...].

    Raises:
        ValueError: if the map is not made of square units that fill the cells.
    """
    height, width = shape[1:3]
    side = height // (2 * cells[0])
    if (2 * cells[0] * side, 2 * cells[1] * side) != (height, width) or side == 0:
        raise ValueError(
            f"a map of {height} x {width} does not divide into square units of {cells[0]} x {cells[1]} cells"
        )
    return side


def _four_units(x: jax.Array, cells: tuple[int, ...]) -> list[jax.Array]:
    """Split [B, H, W, C] into its four compact maps [B, rows, k, columns, k, C], one for each offset."""
    k = unit_side(x.shape, cells)
    x = x.reshape(x.shape[0], cells[0], 2, k, cells[1], 2, k, -1)
    return [x[:, :, dy, :, :, dx] for dy in (0, 1) for dx in (0, 1)]


def _per_cell(values: jax.Array) -> jax.Array:
    """[B, rows, columns] -> [B, rows, 1, columns, 1, 1], to meet the maps of `_four_units`."""
    return values[:, :, None, :, None, None]


def _flat(x: jax.Array) -> jax.Array:
    """[B, rows, k, columns, k, C] -> [B, rows * k, columns * k, C]."""
    batch, rows, k, columns, _, channels = x.shape
    return x.reshape(batch, rows * k, columns * k, channels)


def compact(x: jax.Array, offset: jax.Array) -> jax.Array:
    """The sampled units side by side: [B, H, W, C] -> [B, H / 2, W / 2, C].

    `x` may have batch 1 while `offset` has more: one map, compacted for every image (position tables).
    """
    units = _four_units(x, offset.shape[1:])
    offset = _per_cell(offset)
    upper = jnp.where(offset == 0, units[0], units[1])
    lower = jnp.where(offset == 2, units[2], units[3])
    return _flat(jnp.where(offset < 2, upper, lower))


def masked_units(x: jax.Array, offset: jax.Array) -> jax.Array:
    """The complement of `compact`: the three units of each cell that were not sampled, in row-major order.

    [B, H, W, C] -> [B, 3, H / 2, W / 2, C]; map j holds the j-th unit of each cell that was not sampled.
    """
    units = _four_units(x, offset.shape[1:])
    offset = _per_cell(offset)
    # The j-th unit left over is unit j, or unit j + 1 from the sampled one on.
    return jnp.stack([_flat(jnp.where(offset <= j, units[j + 1], units[j])) for j in range(3)], axis=1)


def assemble(sampled: jax.Array, masked: jax.Array, offset: jax.Array) -> jax.Array:
    """The inverse of `compact` and `masked_units` together.

    Args:
        sampled: [B, H / 2, W / 2, C].
        masked: [B, 3, H / 2, W / 2, C], or any shape that broadcasts to it, such as zeros of [1, 1, 1, 1, 1].
        offset: [B, cell rows, cell columns].

    Returns:
        [B, H, W, C].
    """
    batch, height, width, channels = sampled.shape
    rows, columns = offset.shape[1:]
    k = height // rows
    cut = (batch, rows, k, columns, k, channels)
    masked = jnp.broadcast_to(masked, (batch, 3, height, width, channels))
    left_over = [masked[:, j].reshape(cut) for j in range(3)]
    sampled, offset = sampled.reshape(cut), _per_cell(offset)
    units = []
    for place in range(4):
        before, after = left_over[min(place, 2)], left_over[max(place - 1, 0)]
        units.append(jnp.where(offset == place, sampled, jnp.where(offset > place, before, after)))
    whole = jnp.stack(units, axis=1).reshape(batch, 2, 2, *cut[1:])
    # [B, dy, dx, rows, k, columns, k, C] -> [B, rows, dy, k, columns, dx, k, C]
    return whole.transpose(0, 3, 1, 4, 5, 2, 6, 7).reshape(batch, 2 * height, 2 * width, channels)


def expand(values: jax.Array, side: int) -> jax.Array:
    """Repeat a value a cell over the side x side elements of its unit: [B, rows, columns] -> [B, rows k, columns k]."""
    return jnp.repeat(jnp.repeat(values, side, axis=1), side, axis=2)


def original_coordinates(offset: jax.Array, side: int) -> jax.Array:
    """Row and column, on the full grid, of every token of the compact grid.

    Args:
        offset: [B, cell rows, cell columns].
        side: tokens on a unit's side.

    Returns:
        int32 [B, cell rows * side, cell columns * side, 2]. A token at place k of the unit at cell c lies at
        (2 c + d) side + k, d being the unit's dy or dx.
    """
    rows, columns = offset.shape[1] * side, offset.shape[2] * side
    offset = expand(offset, side)
    row = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
    column = jnp.arange(columns, dtype=jnp.int32)[None, None, :]
    # The token's place on the compact grid, moved by one unit for every cell before it, and by its own unit's offset.
    row = row + (row // side + offset // 2) * side
    column = column + (column // side + offset % 2) * side
    return jnp.stack([row, column], axis=-1)


def _gather_units(x: jax.Array, order: jax.Array, side: int | None = None) -> jax.Array:
    """Units of a map in another order: [B or 1, H, W, C] -> [B, m, rows * k, columns * k, C].

    Args:
        x: a map of units of `side` x `side` elements; the full grid's where no side is given.
        order: [B, m, rows, columns], which unit, counted row by row.
    """
    batch, m, rows, columns = order.shape
    k = unit_side(x.shape, (rows, columns)) if side is None else side
    channels = x.shape[-1]
    units = x.reshape(x.shape[0], x.shape[1] // k, k, x.shape[2] // k, k, channels)
    units = units.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], -1, k * k * channels)
    units = jnp.broadcast_to(units, (batch, *units.shape[1:]))
    chosen = jnp.take_along_axis(units, order.reshape(batch, -1, 1), axis=1)
    chosen = chosen.reshape(batch, m, rows, columns, k, k, channels).transpose(0, 1, 2, 4, 3, 5, 6)
    return chosen.reshape(batch, m, rows * k, columns * k, channels)
