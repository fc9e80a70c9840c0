"""RoIAlign with aligned corners and an adaptive number of samples (DET 1.6).

The features of a box are `rows @ map @ columns.T`: a bin averages samples of a bilinear interpolation, which separates
into two matrices of weights. Each box reads one window of cells at its start, and more of them if it is larger, so
that the work does not depend on the size of the maps, and the result is exact for all boxes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_T = TypeVar("_T")

LEVELS = 4
FIRST_SIDE = 56  # boxes of twice this side and more, in pixels, leave the first level
# Samples are more than half a cell apart where a bin has several, so that at most 4 of them touch a cell. Two more
# allow for rounding.
MAX_TOUCHING = 6


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
    """Return the features of boxes of one image.

    Samples more than a cell outside a map count as 0. Empty boxes have features 0. No gradient flows to the boxes.

    Args:
        maps: features of each level, [H_l, W_l, C]. The sums are float32 for each dtype.
        boxes: float32 [R, 4].
        levels: map of each box, int32 [R].
        size: rows and columns of the result.
        strides: pixels per cell of each map.
        window: rows and columns of cells that are read at a time; changes only speed and memory.
        chunk: boxes that are computed at a time; changes only speed and memory.

    Returns:
        [R, size, size, C] of the maps' dtype.
    """
    shapes = tuple((level.shape[0], level.shape[1]) for level in maps)
    layout = _Layout(shapes, tuple(strides), size, window, chunk)
    return _roi_align(layout, tuple(maps), lax.stop_gradient(boxes), levels)


@dataclass(frozen=True)
class _Layout:
    """Static sizes. The atlas is one array of all maps: the first left, the others in a column on its right."""

    shapes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    size: int
    max_window: int
    chunk: int

    @property
    def atlas(self) -> tuple[int, int]:
        (height, width), others = self.shapes[0], self.shapes[1:]
        side = max((other[1] for other in others), default=0)
        return max(height, sum(other[0] for other in others)), width + side

    @property
    def window(self) -> tuple[int, int]:
        return min(self.max_window, self.atlas[0]), min(self.max_window, self.atlas[1])

    @property
    def origins(self) -> tuple[tuple[int, int], ...]:
        """Position of each map's first cell in the atlas."""
        heights = [shape[0] for shape in self.shapes[1:]]
        return (0, 0), *((sum(heights[:k]), self.shapes[0][1]) for k in range(len(heights)))

    def pack(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Build the atlas, [rows, columns, C]."""
        if len(maps) == 1:
            return maps[0]

        def pad(x: jax.Array, height: int, width: int) -> jax.Array:
            return jnp.pad(x, ((0, height - x.shape[0]), (0, width - x.shape[1]), (0, 0)))

        height, width = self.atlas
        width -= self.shapes[0][1]
        column = jnp.concatenate([pad(level, level.shape[0], width) for level in maps[1:]])
        return jnp.concatenate([pad(maps[0], height, self.shapes[0][1]), pad(column, height, width)], axis=1)

    def unpack(self, atlas: jax.Array) -> tuple[jax.Array, ...]:
        """Invert `pack`."""
        regions = zip(self.origins, self.shapes, strict=True)
        return tuple(atlas[row : row + height, column : column + width] for (row, column), (height, width) in regions)


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


class _Boxes(NamedTuple):
    """Boxes with their position in the atlas."""

    rows: BoxAxis
    columns: BoxAxis
    origin: jax.Array  # int32 [R, 2], first cell of the box's map in the atlas
    tiles: jax.Array  # int32 [R, 2], windows that cover the box, by axis


def _locate(layout: _Layout, boxes: jax.Array, levels: jax.Array) -> _Boxes:
    boxes = boxes / jnp.asarray(layout.strides, boxes.dtype)[levels][:, None]
    limits = jnp.asarray(layout.shapes, boxes.dtype)[levels]
    axes = [box_axis(boxes[:, 1 - k], boxes[:, 3 - k], limits[:, k], layout.size) for k in (0, 1)]
    tiles = [1 + (axis.last - axis.first) // side for axis, side in zip(axes, layout.window, strict=True)]
    return _Boxes(axes[0], axes[1], jnp.asarray(layout.origins, jnp.int32)[levels], jnp.stack(tiles, axis=-1))


def _tile(layout: _Layout, box: _Boxes, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the start of a box's tile in the atlas, [2], and the weights of rows and columns, [size, window]."""
    tile = jnp.stack([number // box.tiles[1], number % box.tiles[1]])
    starts, weights = [], []
    for k, axis in enumerate((box.rows, box.columns)):
        first = axis.first + tile[k] * layout.window[k]
        # A window that would leave the atlas is moved back. Its cells before the tile belong to another one.
        start = jnp.minimum(box.origin[k] + first, layout.atlas[k] - layout.window[k])
        cells = start - box.origin[k] + jnp.arange(layout.window[k], dtype=jnp.int32)
        weight = axis_weights(axis, cells.astype(jnp.float32), layout.size)
        weights.append(jnp.where((cells >= first)[None], weight, 0))
        starts.append(start)
    return jnp.stack(starts), weights[0], weights[1]


def _tile_features(layout: _Layout, atlas: jax.Array, box: _Boxes, number: jax.Array) -> jax.Array:
    """Return what one tile adds to a box's features, float32 [size, size, C]."""
    start, rows, columns = _tile(layout, box, number)
    cells = lax.dynamic_slice(atlas, (start[0], start[1], jnp.int32(0)), (*layout.window, atlas.shape[-1]))
    half = jnp.einsum("ph,hwc->pwc", rows, cells.astype(jnp.float32))
    return jnp.einsum("qw,pwc->pqc", columns, half)


def _tile_gradients(
    layout: _Layout, gradient: jax.Array, box: _Boxes, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the start of a box's tile, [2], and the gradient of its cells, float32 [*window, C]."""
    start, rows, columns = _tile(layout, box, number)
    half = jnp.einsum("qw,pqc->pwc", columns, gradient.astype(jnp.float32))
    return start, jnp.einsum("ph,pwc->hwc", rows, half)


def _sort_and_pad(layout: _Layout, boxes: jax.Array, levels: jax.Array) -> tuple[_Boxes, jax.Array]:
    """Return boxes ordered by number of tiles, since a chunk takes as long as its largest, and that order, int32 [R].

    Empty boxes are added for whole chunks.
    """
    chunk = min(layout.chunk, len(boxes))
    padding = -len(boxes) % chunk
    boxes, levels = jnp.pad(boxes, ((0, padding), (0, 0))), jnp.pad(levels, (0, padding))
    located = _locate(layout, boxes, levels)
    order = jnp.argsort(located.tiles.prod(-1))
    return jax.tree.map(lambda x: x[order], located), order


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _roi_align(layout: _Layout, maps: tuple[jax.Array, ...], boxes: jax.Array, levels: jax.Array) -> jax.Array:
    located, order = _sort_and_pad(layout, boxes, levels)
    aligned = _batch_natively(partial(_features, layout))(located, layout.pack(maps))
    return aligned[jnp.argsort(order)[: len(boxes)]]


def _forward(
    layout: _Layout, maps: tuple[jax.Array, ...], boxes: jax.Array, levels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _roi_align(layout, maps, boxes, levels), (boxes, levels)


def _backward(
    layout: _Layout, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[tuple[jax.Array, ...], None, None]:
    located, order = _sort_and_pad(layout, *saved)
    padding = len(order) - len(gradient)
    padded = jnp.pad(gradient, ((0, padding), (0, 0), (0, 0), (0, 0)))[order]
    atlas = _batch_natively(partial(_atlas_gradient, layout))(located, padded)
    return tuple(level.astype(gradient.dtype) for level in layout.unpack(atlas)), None, None


_roi_align.defvjp(_forward, _backward)


def _batch_natively(compute: Callable[[_Boxes, jax.Array], jax.Array]) -> Callable[[_Boxes, jax.Array], jax.Array]:
    """Return a function of one image that under `jax.vmap` calls `compute`, which is one of a batch.

    The rule of JAX for a loop of traced length selects the old or the new value for each image in every iteration.
    That would copy the gradient of the atlas, and make the devices of a sharded batch agree on the end each time.
    """

    @jax.custom_batching.custom_vmap
    def single(boxes: _Boxes, x: jax.Array) -> jax.Array:
        return compute(*jax.tree.map(lambda array: array[None], (boxes, x)))[0]

    @single.def_vmap
    def _batched(
        axis_size: int, in_batched: tuple[_Boxes, bool], boxes: _Boxes, x: jax.Array
    ) -> tuple[jax.Array, bool]:
        def add_batch(array: jax.Array, batched: bool) -> jax.Array:
            return array if batched else jnp.broadcast_to(array[None], (axis_size, *array.shape))

        return compute(*jax.tree.map(add_batch, (boxes, x), tuple(in_batched))), True

    return single


def _features(layout: _Layout, boxes: _Boxes, atlas: jax.Array) -> jax.Array:
    """Compute the features of boxes [B, R] in atlases [B, rows, columns, C]: [B, R, size, size, C]."""
    chunk, iterations = _chunks(layout, boxes)
    batch, channels = atlas.shape[0], atlas.shape[-1]
    features = jax.vmap(jax.vmap(partial(_tile_features, layout), in_axes=(None, 0, None)), in_axes=(0, 0, None))

    def compute(number: jax.Array) -> jax.Array:
        chunk_boxes = _take(boxes, number, chunk)
        zeros = jnp.zeros((batch, chunk, layout.size, layout.size, channels), jnp.float32)
        total = lax.fori_loop(
            0, iterations[number], lambda tile, total: total + features(atlas, chunk_boxes, tile), zeros
        )
        return total.astype(atlas.dtype)

    aligned = lax.map(compute, jnp.arange(len(iterations), dtype=jnp.int32))
    return jnp.moveaxis(aligned, 0, 1).reshape(batch, -1, layout.size, layout.size, channels)


def _atlas_gradient(layout: _Layout, boxes: _Boxes, gradient: jax.Array) -> jax.Array:
    """Add up the gradients of boxes [B, R, size, size, C] in those of atlases, float32 [B, rows, columns, C]."""
    chunk, iterations = _chunks(layout, boxes)
    tile_gradients = jax.vmap(jax.vmap(partial(_tile_gradients, layout), in_axes=(0, 0, None)), in_axes=(0, 0, None))

    def add_chunk(number: jax.Array, atlas: jax.Array) -> jax.Array:
        chunk_boxes, chunk_gradient = _take((boxes, gradient), number, chunk)

        def add_tile(tile: jax.Array, atlas: jax.Array) -> jax.Array:
            return jax.vmap(_add_windows)(atlas, *tile_gradients(chunk_gradient, chunk_boxes, tile))

        return lax.fori_loop(0, iterations[number], add_tile, atlas)

    zeros = jnp.zeros((len(gradient), *layout.atlas, gradient.shape[-1]), jnp.float32)
    return lax.fori_loop(0, len(iterations), add_chunk, zeros)


def _chunks(layout: _Layout, boxes: _Boxes) -> tuple[int, jax.Array]:
    """Return the boxes per chunk, and the max tiles of a box in each chunk of a batch, int32 [chunks]."""
    tiles = boxes.tiles.prod(-1)
    chunk = min(layout.chunk, tiles.shape[1])
    return chunk, tiles.reshape(len(tiles), -1, chunk).max((0, 2))


def _take(arrays: _T, number: jax.Array, chunk: int) -> _T:
    """Return a chunk of arrays [B, R, ...]."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * chunk, chunk, axis=1), arrays)


def _add_windows(atlas: jax.Array, starts: jax.Array, windows: jax.Array) -> jax.Array:
    """Add windows [n, rows, columns, C] to an array at their starts, [n, 2]."""
    dimensions = lax.ScatterDimensionNumbers((1, 2, 3), (), (0, 1))
    return lax.scatter_add(atlas, starts, windows, dimensions, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
