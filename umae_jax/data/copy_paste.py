"""Simple Copy-Paste: put objects of one image into another (Ghiasi et al., 2021). Does not import JAX.

It stands where HTC++ used InstaBoost. InstaBoost moves objects inside their own image and so must in-paint the places
that they leave; Copy-Paste needs the masks alone, which are there. Its paper reports larger gains, together with
large-scale jitter, and finds blended edges and a choice of matching scenes unnecessary.
"""

import random
from typing import NamedTuple

import numpy as np

from umae_jax.data.instances import Region, window
from umae_jax.data.placement import Placement

PASTE_PROBABILITY = 0.5  # of each object of the second image
MIN_VISIBLE = 0.1  # fraction of a mask; an object with less left is dropped


class Layer(NamedTuple):
    """An image in its canvas, without the padding, and its objects."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    boxes: np.ndarray  # x1 y1 x2 y2, float32 [N, 4]
    labels: np.ndarray  # int32 [N]
    masks: tuple[Region | None, ...]  # in pixels of `placement.source`
    placement: Placement
    semantic: np.ndarray | None = None  # upper left pixels of blocks of 8 x 8, uint8

    def take(self, indices: np.ndarray) -> "Layer":
        """Return the layer with some of its objects."""
        masks = tuple(self.masks[index] for index in indices)
        return self._replace(boxes=self.boxes[indices], labels=self.labels[indices], masks=masks)


def blend(layer: Layer, other: Layer, rng: random.Random, ignored: int, stride: int) -> Layer:
    """Paste each object of `other` that has a mask with probability PASTE_PROBABILITY.

    Masks lose what is pasted over them. Boxes of occluded and of pasted objects become those of their masks. Objects
    without a mask keep their boxes.

    Args:
        layer: keeps its size; what would lie outside of it is not pasted.
        other: in a canvas of the same size.
        rng: generator of the sample.
        ignored: value of pasted pixels in the semantic map.
        stride: pixels per pixel of the semantic map.
    """
    height, width = layer.placement.content
    covered = np.zeros((height, width), np.uint8)
    boxes, labels, masks = [], [], []
    for label, mask in zip(other.labels, other.masks, strict=True):
        if rng.random() >= PASTE_PROBABILITY or mask is None:
            continue
        placed = other.placement.place(mask)
        placed = placed._replace(pixels=placed.pixels[: max(0, height - placed.top), : max(0, width - placed.left)])
        if not placed.pixels.any():
            continue
        rows, columns = placed.pixels.shape
        covered[placed.top : placed.top + rows, placed.left : placed.left + columns] |= placed.pixels
        boxes.append(placed.box)
        labels.append(label)
        masks.append(placed)
    if not masks:
        return layer
    kept_boxes, kept_labels, kept_masks = [], [], []
    for box, label, mask in zip(layer.boxes, layer.labels, layer.masks, strict=True):
        if mask is not None:
            placed = layer.placement.place(mask)
            rows, columns = placed.pixels.shape
            above = window(Region(covered, 0, 0), placed.left, placed.top, placed.left + columns, placed.top + rows)
            visible = placed.pixels & ~above
            before, after = int(placed.pixels.sum()), int(visible.sum())
            if after < before:
                if after < MIN_VISIBLE * before:
                    continue
                placed = placed._replace(pixels=visible)
                box = placed.box
            mask = placed
        kept_boxes.append(box)
        kept_labels.append(label)
        kept_masks.append(mask)
    pixels = layer.pixels.copy()
    rows, columns = min(height, other.pixels.shape[0]), min(width, other.pixels.shape[1])
    np.copyto(pixels[:rows, :columns], other.pixels[:rows, :columns], where=covered[:rows, :columns, None] > 0)
    semantic = layer.semantic
    if semantic is not None:
        semantic = np.where(covered[::stride, ::stride] > 0, np.uint8(ignored), semantic)
    return Layer(
        pixels,
        np.array([*kept_boxes, *boxes], np.float32),
        np.array([*kept_labels, *labels], np.int32),
        (*kept_masks, *masks),
        Placement(layer.placement.content, layer.placement.content, (0, 0), layer.placement.content),
        semantic,
    )
