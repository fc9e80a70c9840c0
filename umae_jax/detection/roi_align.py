"""RoIAlign with aligned corners and an adaptive number of samples (DET 1.6).

The features of a box are `rows @ map @ columns.T`: a bin averages samples of a bilinear interpolation, which separates
into two matrices of weights. A box of a pyramid covers few cells of its level. The levels are cut into tiles, and each
box reads the window of tiles under it, and more windows if it is larger than one. A box on a single map may cover all
of it, so the matrices multiply the whole map. Both are exact for every box.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LEVELS = 4
FIRST_SIDE = 56  # boxes of twice this side and more, in pixels, leave the first level
# Samples are more than half a cell apart where a bin has several, so that at most 4 of them touch a cell. The first one
# looked at may touch none, and one more allows for rounding.
MAX_TOUCHING = 6
TILE = 8  # rows and columns of cells: the memory of a TPU is laid out in eights
WINDOW = 4  # rows and columns of tiles that a box reads at a time


def roi_levels(boxes: jax.Array) -> jax.Array:
    """Return the level of the pyramid, 0..3 for P2..P5, that each box reads: [..., 4] -> int32 [...] (DET 1.6)."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    level = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / FIRST_SIDE + 1e-6))
    return jnp.clip(level, 0, LEVELS - 1).astype(jnp.int32)


@partial(jax.tree_util.register_dataclass, data_fields=["cells"], meta_fields=["sizes", "strides"])
@dataclass(frozen=True)
class Tiles:
    """Levels of a pyramid, cut into tiles; a pytree of one array."""

    cells: jax.Array  # [B, tiles, TILE, TILE, C]; the last tiles of a row or column are filled with zeros
    sizes: tuple[tuple[int, int], ...]  # rows and columns of cells of each level
    strides: tuple[int, ...]  # pixels per cell


def cut(maps: Sequence[jax.Array], strides: Sequence[int]) -> Tiles:
    """Cut maps [B, H_l, W_l, C] of some pixels per cell into tiles."""
    tiles = []
    for level in maps:
        batch, height, width, channels = level.shape
        padded = jnp.pad(level, ((0, 0), (0, -height % TILE), (0, -width % TILE), (0, 0)))
        split = padded.reshape(batch, padded.shape[1] // TILE, TILE, -1, TILE, channels).swapaxes(2, 3)
        tiles.append(split.reshape(batch, -1, TILE, TILE, channels))
    sizes = tuple((level.shape[1], level.shape[2]) for level in maps)
    return Tiles(jnp.concatenate(tiles, 1), sizes, tuple(strides))


def roi_align(tiles: Tiles, boxes: jax.Array, levels: jax.Array, *, size: int, chunk: int = 64) -> jax.Array:
    """Return the features of boxes on a pyramid, [B, R, size, size, C] of its dtype.

    The sums are float32; products round as the platform's default precision does. Samples more than a cell outside a
    map count as 0. Empty boxes have features 0. No gradient flows to the boxes.

    Args:
        tiles: the levels.
        boxes: float32 [B, R, 4].
        levels: that each box reads, int32 [B, R].
        size: rows and columns of the result.
        chunk: boxes that are computed at a time; changes only speed and memory.
    """
    sizes = np.array(tiles.sizes, np.int32)
    rows, columns = _locate(boxes, jnp.array(tiles.strides, jnp.float32)[levels], jnp.asarray(sizes)[levels], size)
    grid = -(-sizes // TILE)
    corners = np.cumsum([0, *grid.prod(1)[:-1]], dtype=np.int32)
    spans = [1 + (axis.last // TILE - axis.first // TILE) // WINDOW for axis in (rows, columns)]
    empty = (rows.samples == 0) | (columns.samples == 0)
    windows = jnp.where(empty[..., None], 0, jnp.stack(spans, -1))
    placed = _Boxes(rows, columns, jnp.asarray(corners)[levels], jnp.asarray(grid)[levels], windows)
    return _align(_Options(size, max(1, min(chunk, boxes.shape[1]))), tiles.cells, placed).astype(tiles.cells.dtype)


def roi_align_whole(
    level: jax.Array, boxes: jax.Array, *, size: int, stride: int, pool: int = 1, chunk: int = 128
) -> jax.Array:
    """Return the features of boxes on a single map, [B, H, W, C], after mean pooling; otherwise as `roi_align`.

    Weights, and the sums over the rows of the map, have the map's dtype.

    Args:
        level: the map.
        boxes: float32 [B, R, 4].
        size: rows and columns of the result.
        stride: pixels per cell.
        pool: side of the pooling window, in bins.
        chunk: boxes that are computed at a time; changes only speed and memory.
    """
    count, level32 = boxes.shape[1], level.astype(jnp.float32)
    limits = jnp.broadcast_to(jnp.array(level.shape[1:3], jnp.int32), (*boxes.shape[:2], 2))
    axes = _locate(boxes, jnp.full(boxes.shape[:2], stride, jnp.float32), limits, size * pool)

    def weights_of(axis: BoxAxis, cells: int) -> jax.Array:
        places = jnp.arange(cells, dtype=jnp.int32)
        weights = jax.vmap(jax.vmap(lambda one: axis_weights(one, places, size * pool)))(axis)
        return weights.reshape(*weights.shape[:2], size, pool, cells).mean(3).astype(level.dtype)

    def read(axes: tuple[BoxAxis, BoxAxis]) -> jax.Array:
        rows, columns = map(weights_of, axes, level.shape[1:3])
        # The gradient of the map adds up over chunks in float32.
        half = jnp.einsum("brph,bhwc->brpwc", rows, level32.astype(level.dtype))
        return jnp.einsum("brqw,brpwc->brpqc", columns, half, preferred_element_type=jnp.float32).astype(level.dtype)

    chunk = max(1, min(chunk, count))
    return _join(lax.map(read, jax.tree.map(lambda x: _split(chunk, _pad(chunk, x)), axes)))[:, :count]


class BoxAxis(NamedTuple):
    """The samples of boxes along one axis of their maps, in cells; the arrays have one number per box."""

    start: jax.Array  # float32, coordinate where the box begins; cell centers are integers
    bin_size: jax.Array  # float32
    samples: jax.Array  # float32, samples per bin; 0 for empty boxes
    limit: jax.Array  # int32, cells of the map
    first: jax.Array  # int32, first cell that a sample touches
    last: jax.Array  # int32


def _locate(boxes: jax.Array, strides: jax.Array, limits: jax.Array, size: int) -> tuple[BoxAxis, BoxAxis]:
    """Describe rows and columns of boxes [B, R, 4], given strides [B, R] and sizes [B, R, 2] of their maps."""
    boxes = lax.stop_gradient(boxes) / strides[..., None]
    rows, columns = (box_axis(boxes[..., 1 - k], boxes[..., 3 - k], limits[..., k], size) for k in (0, 1))
    return rows, columns


def box_axis(low: jax.Array, high: jax.Array, limit: jax.Array, size: int) -> BoxAxis:
    """Describe the samples of boxes, given their ends in cells (0 is the map's border), for `size` bins."""
    start, end = low - 0.5, high - 0.5
    extent = end - start
    bin_size = extent / size
    # ceil(bin_size), safe from a division that rounds a whole number up
    samples = jnp.maximum(jnp.floor(bin_size), 0)
    samples = jnp.where(samples * size < extent, samples + 1, samples)
    half = bin_size / jnp.maximum(samples, 1) / 2
    end_cell = limit.astype(jnp.float32) - 1
    first, last = (jnp.floor(jnp.clip(x, 0, end_cell)).astype(jnp.int32) for x in (start + half, end - half))
    return BoxAxis(start, bin_size, samples, limit, first, jnp.minimum(last + 1, limit - 1))


def axis_weights(axis: BoxAxis, cells: jax.Array, size: int) -> jax.Array:
    """Return the weight of each cell in each bin of one box: int32 [K] -> float32 [size, K]; 0 beyond the map."""
    spacing, limit = axis.bin_size / jnp.maximum(axis.samples, 1), axis.limit.astype(jnp.float32)
    first = axis.start + spacing / 2 + axis.bin_size * jnp.arange(size, dtype=jnp.float32)
    first, cell = first[None, :, None], cells.astype(jnp.float32)[None, None]  # [MAX_TOUCHING, size, K]
    lowest = jnp.floor((cell - 1 - first) / jnp.where(axis.samples > 0, spacing, 1))
    lowest = jnp.clip(lowest, 0, jnp.maximum(axis.samples - 1, 0))
    sample = lowest + jnp.arange(MAX_TOUCHING, dtype=jnp.float32)[:, None, None]
    position = first + spacing * sample
    counts = (sample < axis.samples) & (position >= -1) & (position <= limit)
    weights = jnp.maximum(1 - jnp.abs(jnp.clip(position, 0, limit - 1) - cell), 0)
    return jnp.where(counts, weights, 0).sum(0) / jnp.maximum(axis.samples, 1)


class _Options(NamedTuple):
    """Static numbers."""

    size: int
    chunk: int


class _Boxes(NamedTuple):
    """Boxes [B, R] of a pyramid."""

    rows: BoxAxis
    columns: BoxAxis
    corner: jax.Array  # int32 [B, R], first tile of the box's level
    grid: jax.Array  # int32 [B, R, 2], rows and columns of tiles of the level
    windows: jax.Array  # int32 [B, R, 2], rows and columns of windows that cover the box


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, cells: jax.Array, boxes: _Boxes) -> jax.Array:
    """Return the features of boxes, float32 [B, R, size, size, C]."""
    queue = _enqueue(options, boxes)
    size, chunk = options

    def read(cells: jax.Array, box: _Boxes, number: jax.Array) -> jax.Array:
        tiles, rows, columns = _window(options, box, number)
        seen = cells.at[tiles].get(mode="promise_in_bounds").astype(jnp.float32)
        seen = seen.reshape(WINDOW, WINDOW * TILE, TILE, -1)  # columns of tiles, rows, columns, channels
        half = jnp.einsum("ph,jhwc->pjwc", rows, seen)
        return jnp.einsum("qw,pwc->pqc", columns, half.reshape(size, WINDOW * TILE, -1))

    read_all = jax.vmap(jax.vmap(read, (None, 0, None)), (0, 0, None))

    def read_chunk(_: None, some: tuple[_Boxes, jax.Array]) -> tuple[None, jax.Array]:
        boxes, turns = some
        zeros = jnp.zeros((len(cells), chunk, size, size, cells.shape[-1]), jnp.float32)
        return None, lax.fori_loop(0, turns, lambda turn, total: total + read_all(cells, boxes, turn), zeros)

    aligned = lax.scan(read_chunk, None, (queue.boxes, queue.turns))[1]
    return _take(jnp.argsort(queue.order, axis=1)[:, : boxes.corner.shape[1]], _join(aligned))


def _forward(options: _Options, cells: jax.Array, boxes: _Boxes) -> tuple[jax.Array, tuple[jax.Array, _Boxes]]:
    empty = jnp.zeros((0, *cells.shape), cells.dtype)  # carries shape and dtype
    return _align(options, cells, boxes), (empty, boxes)


def _backward(options: _Options, saved: tuple[jax.Array, _Boxes], gradient: jax.Array) -> tuple[jax.Array, None]:
    empty, boxes = saved
    queue = _enqueue(options, boxes)
    size, chunk = options
    gradient = _split(chunk, _take(queue.order, _pad(chunk, gradient)))

    def spread(gradient: jax.Array, box: _Boxes, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        tiles, rows, columns = _window(options, box, number)
        half = jnp.einsum("ph,pqc->hqc", rows, gradient)
        half = jnp.broadcast_to(half, (WINDOW, *half.shape))  # so that the product has the layout of tiles
        seen = jnp.einsum("qjw,jhqc->jhwc", columns.reshape(size, WINDOW, TILE), half)
        return tiles, seen.reshape(len(tiles), TILE, TILE, -1)

    spread_all = jax.vmap(jax.vmap(spread, (0, 0, None)), (0, 0, None))

    def add(total: jax.Array, tiles: jax.Array, cells: jax.Array) -> jax.Array:
        return total.at[tiles].add(cells, mode="promise_in_bounds")

    def add_chunk(total: jax.Array, some: tuple[_Boxes, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        boxes, turns, gradient = some

        def add_turn(turn: jax.Array, total: jax.Array) -> jax.Array:
            return jax.vmap(add)(total, *spread_all(gradient, boxes, turn))

        return lax.fori_loop(0, turns, add_turn, total), None

    total, _ = lax.scan(add_chunk, jnp.zeros(empty.shape[1:], jnp.float32), (queue.boxes, queue.turns, gradient))
    return total.astype(empty.dtype), None


_align.defvjp(_forward, _backward)


class _Queue(NamedTuple):
    """Boxes ordered by their number of windows, the largest first: a chunk takes as long as its largest box."""

    boxes: _Boxes  # [chunks, B, chunk]
    order: jax.Array  # int32 [B, chunks * chunk], rows of these boxes before, with those that were added
    turns: jax.Array  # int32 [chunks], windows of the largest box of each chunk, over all images


def _enqueue(options: _Options, boxes: _Boxes) -> _Queue:
    padded = jax.tree.map(partial(_pad, options.chunk), boxes)
    order = jnp.argsort(-padded.windows.prod(-1), axis=1)
    queued = jax.tree.map(lambda x: _split(options.chunk, _take(order, x)), padded)
    return _Queue(queued, order, queued.windows.prod(-1).max((1, 2)))


def _pad(chunk: int, x: jax.Array) -> jax.Array:
    """Add rows to [B, R, ...] for whole chunks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2)))


def _split(chunk: int, x: jax.Array) -> jax.Array:
    """Split [B, chunks * chunk, ...] into [chunks, B, chunk, ...]."""
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    """Join [chunks, B, chunk, ...] to [B, chunks * chunk, ...]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _take(order: jax.Array, x: jax.Array) -> jax.Array:
    """Return rows of [B, R, ...] in an order, int32 [B, R]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1, mode="promise_in_bounds")


def _window(options: _Options, box: _Boxes, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the tiles of a window of one box, column by column, and the weights of its rows and columns."""
    across = jnp.maximum(box.windows[1], 1)
    places, weights = [], []
    for k, (axis, place) in enumerate(((box.rows, number // across), (box.columns, number % across))):
        tiles = axis.first // TILE + place * WINDOW + jnp.arange(WINDOW, dtype=jnp.int32)
        cells = tiles[:, None] * TILE + jnp.arange(TILE, dtype=jnp.int32)[None]
        weights.append(axis_weights(axis, cells.reshape(-1), options.size))
        # The cells of tiles beyond the map have weights 0. Boxes that fill up a chunk have a grid of 0 tiles.
        places.append(jnp.minimum(tiles, jnp.maximum(box.grid[k], 1) - 1))
    tiles = box.corner + places[0][None] * box.grid[1] + places[1][:, None]
    return tiles.reshape(-1), weights[0], weights[1]
