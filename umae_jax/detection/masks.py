"""Targets of a mask head, and its masks pasted into the image (DET 1.9, 1.11)."""

import jax
import jax.numpy as jnp
from jax import lax

from umae_jax.detection.boxes import EPSILON
from umae_jax.detection.roi_align import axis_weights, box_axis

THRESHOLD = 0.5


def mask_targets(crops: jax.Array, gt_boxes: jax.Array, boxes: jax.Array, size: int = 28) -> jax.Array:
    """Return the target of each positive box: the mask of its object, by RoIAlign, at least half covered (DET 1.9).

    Args:
        crops: masks of the assigned objects, cut out along their boxes and resampled, uint8 [P, h, w], 255 = covered.
        gt_boxes: boxes of those objects, float32 [P, 4]. Outside, the masks are empty.
        boxes: boxes to compute the targets of, float32 [P, 4].
        size: rows and columns of a target.

    Returns:
        float32 [P, size, size] of 0 and 1.
    """
    coverage = aligned_masks(crops, gt_boxes, boxes, size)
    return (coverage >= THRESHOLD).astype(jnp.float32)


def aligned_masks(crops: jax.Array, gt_boxes: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Return the coverage, 0..1, that `mask_targets` compares with 1/2: float32 [P, size, size]."""
    crops = jnp.pad(crops, ((0, 0), (1, 1), (1, 1))).astype(jnp.float32) / 255  # samples beyond the border find zeros
    weights = []
    for axis, cells in ((1, crops.shape[1]), (0, crops.shape[2])):
        low, side = gt_boxes[:, axis], gt_boxes[:, axis + 2] - gt_boxes[:, axis]
        scale = (cells - 2) / jnp.maximum(side, EPSILON)
        first, last = (1 + scale * (boxes[:, corner] - low) for corner in (axis, axis + 2))
        samples = box_axis(first, last, jnp.full(len(boxes), cells, jnp.int32), size)
        positions = jnp.arange(cells, dtype=jnp.int32)
        weights.append(jax.vmap(axis_weights, in_axes=(0, None, None))(samples, positions, size))
    # Low precision would move borders.
    return jnp.einsum("pih,phw,pjw->pij", weights[0], crops, weights[1], precision=lax.Precision.HIGHEST)


def paste(probabilities: jax.Array, boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Resample masks into the image (DET 1.11, step 7).

    Args:
        probabilities: float32 [..., m, m], or [m, m] for one mask.
        boxes: boxes of the masks in pixels of the image, float32 [..., 4].
        height: rows of the image.
        width: columns of the image.

    Returns:
        float32 [..., height, width], 0 outside the boxes but for half a pixel of a mask.
    """

    def weights(axis: int, pixels: int) -> jax.Array:
        cells = probabilities.shape[-2:][1 - axis]
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        center = jnp.broadcast_to(jnp.arange(pixels, dtype=jnp.float32) + 0.5, (*boxes.shape[:-1], pixels))
        position = (center - low) / jnp.maximum(high - low, EPSILON) * cells - 0.5
        cell = jnp.broadcast_to(jnp.arange(cells, dtype=jnp.float32), (*position.shape, cells))
        return jnp.maximum(1 - jnp.abs(position[..., None] - cell), 0)

    rows, columns = weights(1, height), weights(0, width)
    return jnp.einsum("...hi,...ij,...wj->...hw", rows, probabilities, columns, precision=lax.Precision.HIGHEST)
