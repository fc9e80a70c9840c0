"""Masks of objects: polygons and run lengths as COCO stores them, pixels of a region, crops. Does not import JAX."""

import functools
import importlib
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from umae_jax.data.decode import resize
from umae_jax.errors import UserError

CROP_SIZE = 112  # pixels along the side of a mask's crop


class Polygons(NamedTuple):
    """A mask as the union of polygons, each float32 [2 * points]: x and y in turn, in pixels."""

    parts: tuple[np.ndarray, ...]


class RunLengths(NamedTuple):
    """A mask as COCO's compressed run lengths of an image, column after column."""

    counts: bytes


Mask: TypeAlias = Polygons | RunLengths


class Region(NamedTuple):
    """The part of an image's mask that is not empty, or more: 0 and 1, uint8 [h, w], and its upper left pixel."""

    pixels: np.ndarray
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box around the mask, x1 y1 x2 y2; all 0 if it is empty."""
        rows, columns = np.flatnonzero(self.pixels.any(1)), np.flatnonzero(self.pixels.any(0))
        if not len(rows):
            return 0, 0, 0, 0
        return (
            self.left + int(columns[0]),
            self.top + int(rows[0]),
            self.left + int(columns[-1]) + 1,
            self.top + int(rows[-1]) + 1,
        )


class Instances(NamedTuple):
    """The objects of an image, in pixels of the image file."""

    boxes: np.ndarray  # x1 y1 x2 y2, float32 [N, 4]
    labels: np.ndarray  # indices of classes, int32 [N]
    masks: tuple[Mask | None, ...]  # None for an object with a box only


@functools.cache
def mask_api() -> Any:  # noqa: ANN401 - a module
    """Return the module of COCO's mask functions.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module("faster_coco_eval.core.mask")
    except ImportError:
        raise UserError(
            'polygons and COCO\'s metrics need faster-coco-eval; install it with pip install "umae_jax[detect]"'
        ) from None


def parse_counts(counts: bytes) -> np.ndarray:
    """Decompress run lengths: int64 [runs], zeros and ones in turn.

    A number is a sequence of characters with 5 bits each, the lowest first; from the fourth on it is the difference
    from the run two before.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("its run lengths are not COCO's")
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 11:
        raise ValueError("its run lengths are not COCO's")
    values = np.add.reduceat((digits & 31) << (5 * place), first)
    values = np.where(digits[last] & 16, values - (1 << (5 * (last - first + 1))), values)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def from_counts(counts: np.ndarray, height: int, width: int) -> Region:
    """Return the region of an image's run lengths, int [runs]; a ValueError if they are not those of its size."""
    ends = np.cumsum(counts)
    if not len(ends) or ends[-1] != height * width or counts.min() < 0:
        total = int(ends[-1]) if len(ends) else 0
        raise ValueError(f"its run lengths cover {total} pixels of {width} x {height}")
    count = len(ends) // 2
    starts, ends = ends[: 2 * count : 2], ends[1 : 2 * count : 2]
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    if not len(starts):
        return Region(np.zeros((0, 0), np.uint8), 0, 0)
    left, right = int(starts[0]) // height, (int(ends[-1]) - 1) // height + 1
    steps = np.zeros((right - left) * height + 1, np.int8)
    steps[starts - left * height] += 1
    steps[ends - left * height] -= 1
    columns = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return Region(np.ascontiguousarray(columns[:, top:bottom].T), left, top)


def rasterize(mask: Mask, height: int, width: int) -> Region:
    """Return the pixels of a mask in an image of the given size; they are those of COCO's own functions."""
    if isinstance(mask, RunLengths):
        return from_counts(parse_counts(mask.counts), height, width)
    # Draw in a frame that begins at a whole pixel, where the rounding of corners does not change.
    points = np.concatenate(mask.parts).reshape(-1, 2)
    lower, upper = points.min(0), points.max(0)
    left, top = (max(0, math.floor(side)) for side in lower)
    right, bottom = min(width, math.ceil(upper[0]) + 1), min(height, math.ceil(upper[1]) + 1)
    if right <= left or bottom <= top:
        return Region(np.zeros((0, 0), np.uint8), 0, 0)
    offset = np.array([left, top], np.float64)
    parts = [(part.reshape(-1, 2) - offset).ravel().tolist() for part in mask.parts]
    api = mask_api()
    encoded = api.merge(api.frPyObjects(parts, bottom - top, right - left))
    region = from_counts(parse_counts(encoded["counts"]), bottom - top, right - left)
    return Region(region.pixels, region.left + left, region.top + top)


def encode(region: Region, height: int, width: int) -> dict[str, Any]:
    """Return the run lengths of an image's mask, as COCO's results hold them: `size` and `counts`.

    The time depends on the region's size, not on the image's.
    """
    rows, columns = region.pixels.shape
    # A zero above and below every column makes its runs begin and end inside it.
    padded = np.zeros((columns, rows + 2), np.uint8)
    padded[:, 1:-1] = region.pixels.T
    flat = padded.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 2)  # starts and ends in turn
    edges = (column + region.left) * height + row + region.top
    if rows == height:  # runs may continue in the next column
        joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    if len(edges) and edges[-1] == height * width:
        counts = counts[:-1]
    encoded = mask_api().frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    text = encoded["counts"]
    return {"size": [height, width], "counts": text.decode() if isinstance(text, bytes) else text}


def crop_mask(region: Region, box: np.ndarray, height: int, width: int, size: int = CROP_SIZE) -> np.ndarray:
    """Return the coverage of a box by a mask, 0 to 255, uint8 [size, size].

    Args:
        region: the mask.
        box: x1 y1 x2 y2 in the same pixels, inside the image.
        height, width: of the image.
        size: of the output; each pixel is a bilinear, antialiased sample.
    """
    x1, y1, x2, y2 = map(float, box)
    margin_x, margin_y = (math.ceil(max(1.0, side / size)) + 1 for side in (x2 - x1, y2 - y1))
    left, top = max(0, math.floor(x1) - margin_x), max(0, math.floor(y1) - margin_y)
    right, bottom = min(width, math.ceil(x2) + margin_x), min(height, math.ceil(y2) + margin_y)
    pixels = window(region, left, top, right, bottom) * np.uint8(255)
    return resize(pixels[..., None], (x1 - left, y1 - top, x2 - left, y2 - top), (size, size), "bilinear")[..., 0]


def window(region: Region, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return a mask's pixels inside a window, with zeros outside of its region: uint8 [bottom - top, right - left]."""
    pixels = np.zeros((bottom - top, right - left), np.uint8)
    rows, columns = region.pixels.shape
    x1, x2 = max(left, region.left), min(right, region.left + columns)
    y1, y2 = max(top, region.top), min(bottom, region.top + rows)
    if x1 < x2 and y1 < y2:
        pixels[y1 - top : y2 - top, x1 - left : x2 - left] = region.pixels[
            y1 - region.top : y2 - region.top, x1 - region.left : x2 - region.left
        ]
    return pixels
