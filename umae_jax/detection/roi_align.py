"""RoIAlign with aligned corners and an adaptive number of samples (DET 1.6).

The features of a box are `rows @ map @ columns.T`: a bin averages samples of a bilinear interpolation, which separates
into two matrices of weights. They are computed in one of two ways, which are both exact for every box. By windows, each
box reads the cells under it only, and more windows if it is larger than one. By whole maps, the matrices multiply all
cells; a TPU does this faster for all but the largest maps, because it needs no reads at traced places. Its products
round weights and features to bfloat16, like those of convolutions.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LEVELS = 4
FIRST_SIDE = 56  # boxes of twice this side and more, in pixels, leave the first level
# Samples are more than half a cell apart where a bin has several, so that less than 4 of them touch a cell. Two more
# allow for rounding.
MAX_TOUCHING = 6
MAX_WHOLE = 2**16  # cells of a map that a TPU multiplies as a whole


def roi_levels(boxes: jax.Array) -> jax.Array:
    """Return the level of the pyramid, 0..3 for P2..P5, that each box reads: [..., 4] -> int32 [...] (DET 1.6)."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    level = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / FIRST_SIDE + 1e-6))
    return jnp.clip(level, 0, LEVELS - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    levels: jax.Array,
    *,
    size: int,
    strides: Sequence[int],
    window: int = 32,
    chunk: int = 32,
) -> jax.Array:
    """Return the features of boxes.

    Samples more than a cell outside a map count as 0. Empty boxes have features 0. No gradient flows to the boxes.

    Args:
        maps: features of each level, [B, H_l, W_l, C]. The sums are float32 for each dtype.
        boxes: float32 [B, R, 4].
        levels: map of each box, int32 [B, R].
        size: rows and columns of the result.
        strides: pixels per cell of each map.
        window: rows and columns of cells that are read at a time; changes only speed and memory.
        chunk: boxes that are computed at a time; changes only speed and memory.

    Returns:
        [B, R, size, size, C] of the maps' dtype.
    """
    boxes = lax.stop_gradient(boxes)
    aligned = []
    for number, (level, stride) in enumerate(zip(maps, strides, strict=True)):
        options = _Options(stride, size, window, min(chunk, boxes.shape[1]))
        aligned.append(_align(options, level, boxes, levels == number))
    return sum(aligned[1:], start=aligned[0]).astype(maps[0].dtype)  # each box is 0 on all levels but one


class BoxAxis(NamedTuple):
    """The samples of boxes along one axis of their maps, in cells; the arrays have one number per box."""

    start: jax.Array  # float32, coordinate where the box begins; cell centers are integers
    bin_size: jax.Array  # float32
    samples: jax.Array  # float32, samples per bin; 0 for empty boxes
    limit: jax.Array  # float32, cells of the map
    first: jax.Array  # int32, first cell that a sample touches
    last: jax.Array  # int32


def box_axis(low: jax.Array, high: jax.Array, limit: jax.Array, size: int) -> BoxAxis:
    """Describe the samples of boxes, given their ends in cells (0 is the map's border), for `size` bins."""
    start, end = low - 0.5, high - 0.5
    extent = end - start
    bin_size = extent / size
    # ceil(bin_size), safe from a division that rounds a whole number up
    samples = jnp.maximum(jnp.floor(bin_size), 0)
    samples = jnp.where(samples * size < extent, samples + 1, samples)
    half = bin_size / jnp.maximum(samples, 1) / 2
    first, last = (jnp.floor(jnp.clip(x, 0, limit - 1)) for x in (start + half, end - half))
    last = jnp.minimum(last + 1, limit - 1)
    return BoxAxis(start, bin_size, samples, limit, first.astype(jnp.int32), last.astype(jnp.int32))


def axis_weights(axis: BoxAxis, cells: jax.Array, size: int) -> jax.Array:
    """Return the weight of each cell in each bin of one box: float32 [K] -> [size, K]."""
    spacing = axis.bin_size / jnp.maximum(axis.samples, 1)
    first = axis.start + spacing / 2 + axis.bin_size * jnp.arange(size, dtype=jnp.float32)
    first, cells = first[:, None], cells[None]
    lowest = jnp.floor((cells - 1 - first) / jnp.where(axis.samples > 0, spacing, 1))
    lowest = jnp.clip(lowest, 0, jnp.maximum(axis.samples - 1, 0))
    total = jnp.zeros_like(lowest)
    for offset in range(MAX_TOUCHING):
        sample = lowest + offset
        position = first + spacing * sample
        counts = (sample < axis.samples) & (position >= -1) & (position <= axis.limit)
        weight = jnp.maximum(1 - jnp.abs(jnp.clip(position, 0, axis.limit - 1) - cells), 0)
        total += jnp.where(counts, weight, 0)
    return total / jnp.maximum(axis.samples, 1)


class _Options(NamedTuple):
    """Static numbers of one map."""

    stride: int
    size: int
    window: int
    chunk: int


class _Boxes(NamedTuple):
    """Boxes [B, R] on a map."""

    rows: BoxAxis
    columns: BoxAxis
    tiles: jax.Array  # int32 [B, R, 2], windows that cover the box, by axis; 0 for boxes of other maps


def _locate(options: _Options, shape: tuple[int, ...], boxes: jax.Array, chosen: jax.Array) -> _Boxes:
    """Describe boxes on a map of a shape [B, H, W, C]; `chosen` are those that read it, bool [B, R]."""
    boxes = boxes / jnp.float32(options.stride)
    rows, columns = (
        box_axis(boxes[..., 1 - k], boxes[..., 3 - k], jnp.full(boxes.shape[:2], float(shape[1 + k])), options.size)
        for k in (0, 1)
    )
    chosen &= (rows.samples > 0) & (columns.samples > 0)
    rows, columns = (axis._replace(samples=jnp.where(chosen, axis.samples, 0)) for axis in (rows, columns))
    height, width = _window(options, shape)
    tiles = jnp.stack([1 + (rows.last - rows.first) // height, 1 + (columns.last - columns.first) // width], axis=-1)
    return _Boxes(rows, columns, jnp.where(chosen[..., None], tiles, 0))


def _window(options: _Options, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a window on a map of a shape [B, H, W, C]."""
    return min(options.window, shape[1]), min(options.window, shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, level: jax.Array, boxes: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return the features of the chosen boxes, float32 [B, R, size, size, C], and 0 for the others."""
    located = _locate(options, level.shape, boxes, chosen)
    by_windows = partial(_read_windows, options)
    if level.shape[1] * level.shape[2] > MAX_WHOLE:
        return by_windows(level, located)
    return lax.platform_dependent(level, located, tpu=partial(_read_whole, options), default=by_windows)


def _forward(
    options: _Options, level: jax.Array, boxes: jax.Array, chosen: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    empty = jnp.zeros((0, *level.shape), level.dtype)  # carries shape and dtype
    return _align(options, level, boxes, chosen), (empty, boxes, chosen)


def _backward(
    options: _Options, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    empty, boxes, chosen = saved
    shape = empty.shape[1:]
    located = _locate(options, shape, boxes, chosen)
    by_windows = partial(_add_windows, options, shape)
    if shape[1] * shape[2] > MAX_WHOLE:
        total = by_windows(gradient, located)
    else:
        by_whole = partial(_add_whole, options, shape)
        total = lax.platform_dependent(gradient, located, tpu=by_whole, default=by_windows)
    return total.astype(empty.dtype), None, None


_align.defvjp(_forward, _backward)


# By whole maps.


def _split_chunks(options: _Options, count: int) -> tuple[int, int]:
    """Return the number of chunks of a count of boxes, and the boxes to add for whole chunks."""
    chunks = -(-count // options.chunk)
    return chunks, chunks * options.chunk - count


def _chunks(options: _Options, x: jax.Array) -> jax.Array:
    """Pad and split [B, R, ...] into chunks, [chunks, B, chunk, ...]."""
    chunks, padding = _split_chunks(options, x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], chunks, options.chunk, *x.shape[2:]).swapaxes(0, 1)


def _whole_weights(options: _Options, axis: BoxAxis, cells: int) -> jax.Array:
    """Return the weights of all cells of an axis, float32 [B, R, size, cells]; 0 for boxes without samples."""
    places = jnp.arange(cells, dtype=jnp.float32)
    return jax.vmap(jax.vmap(lambda one: axis_weights(one, places, options.size)))(axis)


def _read_whole(options: _Options, level: jax.Array, located: _Boxes) -> jax.Array:
    """See `_align`."""

    def read(some: _Boxes) -> jax.Array:
        rows = _whole_weights(options, some.rows, level.shape[1]).astype(level.dtype)
        columns = _whole_weights(options, some.columns, level.shape[2]).astype(level.dtype)
        half = jnp.einsum("brph,bhwc->brpwc", rows, level)
        return jnp.einsum("brqw,brpwc->brpqc", columns, half, preferred_element_type=jnp.float32)

    aligned = lax.map(read, jax.tree.map(partial(_chunks, options), located)).swapaxes(0, 1)
    aligned = aligned.reshape(aligned.shape[0], -1, *aligned.shape[3:])
    return aligned[:, : located.tiles.shape[1]]


def _add_whole(options: _Options, shape: tuple[int, ...], gradient: jax.Array, located: _Boxes) -> jax.Array:
    """Return the gradient of a map, float32 [B, H, W, C]."""

    def add(total: jax.Array, some: tuple[jax.Array, _Boxes]) -> tuple[jax.Array, None]:
        gradient, boxes = some
        rows = _whole_weights(options, boxes.rows, shape[1])
        columns = _whole_weights(options, boxes.columns, shape[2])
        half = jnp.einsum("brqw,brpqc->brpwc", columns, gradient)
        return total + jnp.einsum("brph,brpwc->bhwc", rows, half, preferred_element_type=jnp.float32), None

    chunks = jax.tree.map(partial(_chunks, options), (gradient, located))
    return lax.scan(add, jnp.zeros(shape, jnp.float32), chunks)[0]


# By windows.


class _Queue(NamedTuple):
    """Boxes ordered by their number of windows, the largest first: a chunk takes as long as its largest box."""

    boxes: _Boxes  # [B, chunks * chunk]
    order: jax.Array  # int32 [B, chunks * chunk], rows of these boxes before, with those that were added
    turns: jax.Array  # int32 [chunks], windows of the largest box of each chunk, over all images


def _enqueue(options: _Options, located: _Boxes) -> _Queue:
    chunks, padding = _split_chunks(options, located.tiles.shape[1])
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))), located)
    count = padded.tiles.prod(-1)
    order = jnp.argsort(-count, axis=1)
    queued = jax.tree.map(partial(_take, order), padded)
    turns = jnp.take_along_axis(count, order, 1).reshape(-1, chunks, options.chunk).max((0, 2))
    return _Queue(queued, order, turns)


def _take(order: jax.Array, x: jax.Array) -> jax.Array:
    """Return rows of [B, R, ...] in an order, int32 [B, R]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1)


def _tile(
    options: _Options, shape: tuple[int, ...], box: _Boxes, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the start of a window of one box, [2], and the weights of its rows and columns, [size, window]."""
    across = jnp.maximum(box.tiles[1], 1)
    tile = (number // across, number % across)
    starts, weights = [], []
    for k, (axis, side) in enumerate(zip((box.rows, box.columns), _window(options, shape), strict=True)):
        first = axis.first + tile[k] * side
        # A window that would leave the map is moved back. Its cells before the tile belong to another one.
        start = jnp.minimum(first, shape[1 + k] - side)
        cells = start + jnp.arange(side, dtype=jnp.int32)
        weight = axis_weights(axis, cells.astype(jnp.float32), options.size)
        weights.append(jnp.where((cells >= first)[None], weight, 0))
        starts.append(start)
    return jnp.stack(starts), weights[0], weights[1]


def _read_windows(options: _Options, level: jax.Array, located: _Boxes) -> jax.Array:
    """See `_align`."""
    queue = _enqueue(options, located)
    batch, channels, chunk = level.shape[0], level.shape[3], options.chunk

    def read(cells: jax.Array, box: _Boxes, number: jax.Array) -> jax.Array:
        start, rows, columns = _tile(options, level.shape, box, number)
        place = (start[0], start[1], jnp.int32(0))
        seen = lax.dynamic_slice(cells, place, (*_window(options, level.shape), channels)).astype(jnp.float32)
        return jnp.einsum("qw,pwc->pqc", columns, jnp.einsum("ph,hwc->pwc", rows, seen))

    read_all = jax.vmap(jax.vmap(read, (None, 0, None)), (0, 0, None))

    def read_chunk(number: jax.Array, aligned: jax.Array) -> jax.Array:
        some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * chunk, chunk, 1), queue.boxes)
        zeros = jnp.zeros((batch, chunk, options.size, options.size, channels), jnp.float32)
        total = lax.fori_loop(0, queue.turns[number], lambda turn, total: total + read_all(level, some, turn), zeros)
        return lax.dynamic_update_slice_in_dim(aligned, total, number * chunk, 1)

    aligned = jnp.zeros((batch, queue.order.shape[1], options.size, options.size, channels), jnp.float32)
    aligned = lax.fori_loop(0, (queue.turns > 0).sum(), read_chunk, aligned)
    return _take(jnp.argsort(queue.order, axis=1)[:, : located.tiles.shape[1]], aligned)


def _add_windows(options: _Options, shape: tuple[int, ...], gradient: jax.Array, located: _Boxes) -> jax.Array:
    """Return the gradient of a map, float32 [B, H, W, C]."""
    queue, chunk = _enqueue(options, located), options.chunk
    padding = queue.order.shape[1] - gradient.shape[1]
    gradient = _take(queue.order, jnp.pad(gradient, ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0))))

    def spread(gradient: jax.Array, box: _Boxes, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, rows, columns = _tile(options, shape, box, number)
        return start, jnp.einsum("ph,pwc->hwc", rows, jnp.einsum("qw,pqc->pwc", columns, gradient))

    spread_all = jax.vmap(jax.vmap(spread, (0, 0, None)), (0, 0, None))

    def add_chunk(number: jax.Array, total: jax.Array) -> jax.Array:
        def take(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, number * chunk, chunk, 1)

        some, some_gradient = jax.tree.map(take, (queue.boxes, gradient))

        def add_turn(turn: jax.Array, total: jax.Array) -> jax.Array:
            return jax.vmap(_scatter_add)(total, *spread_all(some_gradient, some, turn))

        return lax.fori_loop(0, queue.turns[number], add_turn, total)

    return lax.fori_loop(0, (queue.turns > 0).sum(), add_chunk, jnp.zeros(shape, jnp.float32))


def _scatter_add(total: jax.Array, starts: jax.Array, windows: jax.Array) -> jax.Array:
    """Add windows [n, rows, columns, C] to an array at their starts, [n, 2]."""
    dimensions = lax.ScatterDimensionNumbers((1, 2, 3), (), (0, 1))
    return lax.scatter_add(total, starts, windows, dimensions, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
