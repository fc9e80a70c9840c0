"""Areas, overlaps and coding of boxes (DET 1.5, 1.7)."""

import math

import jax
import jax.numpy as jnp

Std = tuple[float, float, float, float]

EPSILON = 1e-6  # min union and min hull of an overlap, min side of a box to encode, in pixels
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # bound of decoded dw and dh


def area(boxes: jax.Array) -> jax.Array:
    """Return areas in square pixels: [..., 4] -> [...]; negative if one side is."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip(boxes: jax.Array, image_size: jax.Array) -> jax.Array:
    """Move corners outside the image to its border.

    Args:
        boxes: float32 [..., 4].
        image_size: (height, width), [2] of any numeric dtype.
    """
    height, width = (image_size[axis].astype(boxes.dtype) for axis in (0, 1))
    x, y = jnp.clip(boxes[..., 0::2], 0, width), jnp.clip(boxes[..., 1::2], 0, height)
    return jnp.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], axis=-1)


def encode(boxes: jax.Array, targets: jax.Array, std: Std) -> jax.Array:
    """Return the deltas (dx, dy, dw, dh) / std that move boxes to targets (DET 1.5).

    Sides below EPSILON count as EPSILON, which keeps the deltas of padding finite.

    Args:
        boxes: float32 [..., 4].
        targets: float32 of the same shape.
        std: divisors of the deltas.
    """
    center, side = _center_and_side(boxes)
    target_center, target_side = _center_and_side(targets)
    side, target_side = jnp.maximum(side, EPSILON), jnp.maximum(target_side, EPSILON)
    deltas = jnp.concatenate([(target_center - center) / side, jnp.log(target_side / side)], axis=-1)
    return deltas / _broadcast_std(std, deltas)


def decode(boxes: jax.Array, deltas: jax.Array, std: Std, image_size: jax.Array | None = None) -> jax.Array:
    """Move boxes by deltas; invert `encode` (DET 1.5).

    Args:
        boxes: float32 [..., 4].
        deltas: float32 of the same shape. dw and dh are limited to the ratio of sides 1000 / 16, up and down.
        std: factors of the deltas.
        image_size: clip to (height, width), [2]; no clipping if None.
    """
    center, side = _center_and_side(boxes)
    deltas = deltas * _broadcast_std(std, deltas)
    center = center + deltas[..., :2] * side
    half = side * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)) * 0.5
    decoded = jnp.concatenate([center - half, center + half], axis=-1)
    return decoded if image_size is None else clip(decoded, image_size)


def pairwise_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the IoU of each pair of boxes: [N, 4], [M, 4] -> [N, M]."""
    intersection, union = _intersection_and_union(a[:, None], b[None])
    return intersection / union


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the generalised IoU of boxes (DET 1.7): two arrays [..., 4] that broadcast -> [...], in -1..1."""
    intersection, union = _intersection_and_union(a, b)
    width, height = (jnp.maximum(a[..., k + 2], b[..., k + 2]) - jnp.minimum(a[..., k], b[..., k]) for k in (0, 1))
    hull = jnp.maximum(jnp.maximum(width, 0) * jnp.maximum(height, 0), EPSILON)
    return intersection / union - (hull - union) / hull


def _intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return areas of intersection and of union, the union at least EPSILON."""
    # By coordinate: an array [N, M, 2] would be padded on a TPU.
    width, height = (jnp.minimum(a[..., k + 2], b[..., k + 2]) - jnp.maximum(a[..., k], b[..., k]) for k in (0, 1))
    intersection = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    return intersection, jnp.maximum(area(a) + area(b) - intersection, EPSILON)


def _center_and_side(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (x, y) of the centers and (width, height): [..., 4] -> [..., 2] each."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def _broadcast_std(std: Std, deltas: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(std, deltas.dtype), deltas.shape)
