"""Sizes of images and canvases, and the place of an image in its canvas (DET 1.1, 5). Does not import JAX."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from umae_jax.data.decode import EncodedImage
from umae_jax.data.instances import Region

Size = tuple[int, int]  # height and width


class Canvas(NamedTuple):
    """The canvas of a batch, and the range of the short edges of its images, both ends included."""

    size: Size  # of a landscape canvas
    low: int
    high: int


class Placement(NamedTuple):
    """The place of an image in its canvas: resized, cropped, flipped."""

    source: Size  # of the image file
    resized: Size
    offset: tuple[int, int] = (0, 0)  # upper left corner of the crop in the resized image, top and left
    content: Size = (0, 0)  # height and width of the crop
    flip: bool = False

    @property
    def scale(self) -> np.ndarray:
        """Factors of x1 y1 x2 y2, float64 [4]."""
        return np.array([self.resized[1] / self.source[1], self.resized[0] / self.source[0]] * 2)

    def to_content(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes of the image file into the canvas and clip them to the content, float32 [N, 4]."""
        boxes = boxes * self.scale - np.array([self.offset[1], self.offset[0]] * 2)
        height, width = self.content
        boxes = boxes.clip(0, [width, height, width, height])
        return self._flip(boxes).astype(np.float32)

    def to_source(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes of the canvas back into the image file, float64 [N, 4], clipped to it."""
        boxes = (self._flip(boxes.astype(np.float64)) + np.array([self.offset[1], self.offset[0]] * 2)) / self.scale
        height, width = self.source
        return boxes.clip(0, [width, height, width, height])

    def _flip(self, boxes: np.ndarray) -> np.ndarray:
        width = self.content[1]
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1) if self.flip else boxes

    def pixels(self, image: EncodedImage) -> np.ndarray:
        """Decode the content of the canvas, uint8 [*content, 3]."""
        top, left = self.offset
        corners = np.array([[left, top, left + self.content[1], top + self.content[0]]]) / self.scale
        height, width = self.source
        x1, y1, x2, y2 = corners.clip(0, [width, height, width, height])[0].tolist()
        pixels = image.crop((x1, y1, x2, y2), self.content, 3, "bilinear")
        return pixels[:, ::-1] if self.flip else pixels

    @property
    def rows(self) -> np.ndarray:
        """The nearest row of the image file for each row of the content, int64."""
        return _nearest(self.content[0], self.offset[0], self.source[0], self.resized[0])

    @property
    def columns(self) -> np.ndarray:
        """The nearest column of the image file for each column of the content, int64."""
        columns = _nearest(self.content[1], self.offset[1], self.source[1], self.resized[1])
        return columns[::-1] if self.flip else columns

    def place(self, region: Region) -> Region:
        """Resize a mask of the image file into the canvas by the nearest pixel."""
        height, width = region.pixels.shape
        rows, columns = self.rows - region.top, self.columns - region.left
        inside_y = np.flatnonzero((rows >= 0) & (rows < height))
        inside_x = np.flatnonzero((columns >= 0) & (columns < width))
        if not len(inside_x) or not len(inside_y):
            return Region(np.zeros((0, 0), np.uint8), 0, 0)
        pixels = region.pixels[np.ix_(rows[inside_y], columns[inside_x])]
        return Region(pixels, int(inside_x[0]), int(inside_y[0]))


def _nearest(length: int, offset: int, source: int, resized: int) -> np.ndarray:
    positions = (np.arange(length) + offset + 0.5) * (source / resized)
    return np.minimum(positions.astype(np.int64), source - 1)


def keep_ratio_size(size: Size, short_edge: float, long_edge: float) -> Size:
    """Return the size of an image after its short edge is resized, unless its long edge would exceed the cap (DET 1.1).

    Args:
        size: height and width of the image.
        short_edge: wanted length of the shorter side in pixels.
        long_edge: maximum length of the longer side in pixels.
    """
    factor = min(long_edge / max(size), short_edge / min(size))
    return scaled(size, factor)


def scaled(size: Size, factor: float) -> Size:
    """Return a size times a factor, rounded, at least 1 pixel."""
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def fit(size: Size, short_edge: float, long_edge: float, canvas: Size) -> Size:
    """Return `keep_ratio_size`, reduced further if it does not fit the canvas."""
    factor = min(long_edge / max(size), short_edge / min(size), canvas[0] / size[0], canvas[1] / size[1])
    height, width = scaled(size, factor)
    return min(height, canvas[0]), min(width, canvas[1])


def choose_canvas(seed: int, batch_number: int, canvases: Sequence[Size], short_edge: tuple[int, int]) -> Canvas:
    """Draw the canvas that all images of a batch share.

    A canvas takes the short edges above the height of the one before it, up to its own. Its probability is its share
    of all short edges, so an image's short edge is uniform over the whole range.

    Args:
        canvases: heights and widths of landscape canvases, by ascending height; portrait images use them transposed.
        short_edge: minimum and maximum of the whole range, in pixels.
    """
    choices, below = [], 0
    for size in canvases:
        low, high = max(short_edge[0], below + 1), min(short_edge[1], size[0])
        if low <= high:
            choices.append(Canvas(size, low, high))
        below = max(below, size[0])
    rng = random.Random(f"canvas {seed} {batch_number}")  # a text, so that no sample has the same generator
    return rng.choices(choices, [choice.high - choice.low + 1 for choice in choices])[0]


def oriented(canvas: Size, portrait: bool) -> Size:
    """Return the size of a landscape canvas for images of one orientation."""
    return canvas[::-1] if portrait else canvas
