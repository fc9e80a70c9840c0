"""Describe and draw the images of a detection data set."""

from collections.abc import Iterator, Sequence

import numpy as np

from umae_jax import console
from umae_jax.data.annotations import AnnotatedSource
from umae_jax.data.coco_json import CROWD
from umae_jax.data.instances import Mask, Region, rasterize
from umae_jax.data.transforms import Unreadable, try_load
from umae_jax.drawing import draw_instances, draw_sheet
from umae_jax.errors import require

PICTURES = 6
AREAS = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))  # COCO's, in pixels
MAX_CLASSES = 100  # listed


def describe(source: AnnotatedSource) -> Iterator[str]:
    """Yield lines about a source: classes, boxes, sizes, and what training leaves out."""
    boxes, labels = source.objects
    counts = np.bincount(labels, minlength=len(source.classes))
    images = np.zeros(len(source.classes), np.int64)
    for index in range(len(source)):
        images[np.unique(source.instances(index).labels)] += 1
    width = max(map(len, (*source.classes, "class")))
    yield f"{'class':<{width}} {'id':>6} {'objects':>10} {'images':>10}"
    order = np.argsort(-counts, kind="stable")
    for label in order[:MAX_CLASSES].tolist():
        name, category = source.classes[label], source.category_ids[label]
        yield f"{name:<{width}} {category:>6} {counts[label]:>10,} {images[label]:>10,}"
    if len(order) > MAX_CLASSES:
        yield f"and {len(order) - MAX_CLASSES:,} classes with fewer objects"
    per_image = source.object_counts
    yield f"boxes per image: min {per_image.min():,}, median {np.median(per_image):,.0f}, max {per_image.max():,}"
    if len(boxes):
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        shares = [(name, float(((areas >= low) & (areas < high)).mean())) for name, low, high in AREAS]
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        yield f"box areas (small below 32 x 32, large from 96 x 96 pixels): {listed}"
    heights, widths = source.sizes.T
    yield (
        f"image sizes: width {widths.min()} to {widths.max()}, height {heights.min()} to {heights.max()} pixels; "
        f"{int(source.portrait.sum()):,} portrait, {int((~source.portrait).sum()):,} landscape"
    )
    yield f"masks: {'yes' if source.has_masks else 'no, boxes only'}"
    yield f"crowd regions, which only evaluation uses: {source.left_out.get(CROWD, (0, ''))[0]:,}"
    training = source.for_training()
    yield f"images that can train: {len(training):,} of {len(source):,}"
    for reason, (count, first) in training.left_out.items():
        yield f"left out: {count:,} {reason} (first {first})"


def draw(source: AnnotatedSource, count: int = PICTURES) -> np.ndarray:
    """Draw images spread over a source with their objects, on one sheet: uint8 [H, W, 3].

    Raises:
        UserError: if none of them can be read.
    """
    pictures, captions = [], []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist():
        boxes, labels, masks = source.instances(index)

        def decode(data: bytes, masks: Sequence[Mask | None] = masks) -> tuple[np.ndarray, list[Region | None]]:
            pixels = source.decode(data)
            return pixels, [None if mask is None else rasterize(mask, *pixels.shape[:2]) for mask in masks]

        loaded = try_load(source, index, decode)
        if isinstance(loaded, Unreadable):
            console.warn(f"skipped an image that cannot be read: {loaded.name} ({loaded.reason})")
            continue
        pixels, regions = loaded[1]
        pictures.append(draw_instances(pixels, boxes, labels, source.classes, masks=regions))
        captions.append(f"{loaded[0].name}: {len(boxes)} objects")
    require(bool(pictures), f"--source: none of {count} images can be read; repair them or choose another source")
    return draw_sheet(pictures, captions)
