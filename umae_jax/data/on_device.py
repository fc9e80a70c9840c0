"""Augment batches on the device (SPEC 10, with timm's limits). Every image has its own key and draws."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

ERASE_AREA = (0.02, 1 / 3)  # fraction of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width
ERASE_TRIES = 10  # rectangles drawn until one fits


def sample_keys(seed: int, index: jax.Array) -> jax.Array:
    """Return one key per sample, from the run's seed and the global sample index: uint32 [B] -> keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Flip each image of [B, H, W, C] left to right with probability 0.5."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_erase(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replace a rectangle of each normalised image, float32 [B, H, W, C], by normal noise with this probability."""
    _, height, width, channels = images.shape

    def erase(image: jax.Array, key: jax.Array) -> jax.Array:
        apply_key, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
        min_area, max_area = ERASE_AREA
        area = height * width * jax.random.uniform(area_key, (ERASE_TRIES,), minval=min_area, maxval=max_area)
        low, high = (math.log(limit) for limit in ERASE_ASPECT)
        aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASE_TRIES,), minval=low, maxval=high))
        heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        box_height, box_width = heights[first], widths[first]
        top = jnp.floor(jax.random.uniform(top_key) * (height - box_height + 1))
        left = jnp.floor(jax.random.uniform(left_key) * (width - box_width + 1))
        erased = fits[first] & jax.random.bernoulli(apply_key, probability)
        inside = _inside((top, left), (box_height, box_width), (height, width)) & erased
        return jnp.where(inside[..., None], jax.random.normal(noise_key, (height, width, channels)), image)

    return jax.vmap(erase)(images, keys)


def _inside(corner: Sequence[jax.Array], box: Sequence[jax.Array], size: tuple[int, int]) -> jax.Array:
    """Mark the pixels inside a box, given its upper left corner and its height and width: bool [*size]."""
    rows, columns = (
        (pixels >= start) & (pixels < start + side)
        for start, side, pixels in zip(corner, box, (jnp.arange(n, dtype=jnp.float32) for n in size), strict=True)
    )
    return rows[:, None] & columns[None]


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Return one-hot labels, `smoothing` spread evenly over all classes: int32 [B] -> float32 [B, classes]."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mix images [B, H, W, C] with their neighbours in the batch, and targets [B, classes] with the same weights.

    Images 2i and 2i + 1 are neighbours; B must be even. They are independent, because the data are shuffled, and they
    lie on one device if it holds an even number of images. Each image draws its own weight from a beta distribution
    with alpha `mixup` or `cutmix`. If both are positive, it also draws the method: mixup averages the two images,
    CutMix pastes a rectangle of the other one.
    """
    if not mixup and not cutmix:
        return images, targets
    size = (images.shape[1], images.shape[2])

    def draw_weights(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw an image's own weight at each pixel, [H, W, 1], and its mean, []."""
        method_key, weight_key, top_key, left_key = jax.random.split(key, 4)
        mixup_weight = jax.random.beta(weight_key, mixup or 1.0, mixup or 1.0)
        cutmix_weight = jax.random.beta(weight_key, cutmix or 1.0, cutmix or 1.0)
        # A box may extend beyond the image: only the pixels inside count.
        box = tuple(jnp.floor(side * jnp.sqrt(1 - cutmix_weight)) for side in size)
        centers = [jnp.floor(jax.random.uniform(k) * n) for k, n in zip((top_key, left_key), size, strict=True)]
        corner = tuple(center - jnp.floor(side / 2) for center, side in zip(centers, box, strict=True))
        outside = 1 - _inside(corner, box, size).astype(jnp.float32)
        use_cutmix = jax.random.bernoulli(method_key) if mixup and cutmix else jnp.asarray(bool(cutmix))
        weights = jnp.where(use_cutmix, outside, mixup_weight)
        return weights[..., None], weights.mean()

    def mix_with_neighbor(values: jax.Array, weights: jax.Array) -> jax.Array:
        neighbors = values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)
        return weights * values + (1 - weights) * neighbors

    pixel_weights, target_weights = jax.vmap(draw_weights)(keys)
    return mix_with_neighbor(images, pixel_weights), mix_with_neighbor(targets, target_weights[:, None])
