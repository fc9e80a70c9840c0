"""On the device: from a uint8 batch to what a model sees. Every random draw belongs to its image.

Random erasing, mixup and cutmix after SPEC 10, with the limits that timm gives them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


ERASE_AREA = (0.02, 1 / 3)  # of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width
ERASE_TRIES = 10  # rectangles drawn until one fits


def sample_keys(seed: int, index: jax.Array) -> jax.Array:
    """One key a sample, from the run's seed and the global sample index: uint32 [B] -> keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirror each image [B, H, W, C] left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 0..255 to float32 of zero mean and unit variance, channel by channel: [..., C], or patches [..., n * C]."""
    return (images.astype(jnp.float32) / 255 - _channels(mean, images)) / _channels(std, images)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The inverse of `normalize`, rounded and clipped: float32 [..., C] to uint8."""
    pixels = images * _channels(std, images) + _channels(mean, images)
    return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)


def random_erase(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replace a rectangle of some images [B, H, W, C] by normal noise, pixel by pixel."""
    _, height, width, channels = images.shape

    def erase(image: jax.Array, key: jax.Array) -> jax.Array:
        whether, area, aspect, top, left, noise = jax.random.split(key, 6)
        area = height * width * jax.random.uniform(area, (ERASE_TRIES,), minval=ERASE_AREA[0], maxval=ERASE_AREA[1])
        low, high = (math.log(limit) for limit in ERASE_ASPECT)
        aspect = jnp.exp(jax.random.uniform(aspect, (ERASE_TRIES,), minval=low, maxval=high))
        heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        box = heights[first], widths[first]
        corner = (
            jnp.floor(jax.random.uniform(top) * (height - box[0] + 1)),
            jnp.floor(jax.random.uniform(left) * (width - box[1] + 1)),
        )
        erased = fits[first] & jax.random.bernoulli(whether, probability)
        inside = _inside(corner, box, (height, width)) & erased
        return jnp.where(inside[..., None], jax.random.normal(noise, (height, width, channels)), image)

    return jax.vmap(erase)(images, keys)


def _inside(corner: Sequence[jax.Array], box: Sequence[jax.Array], size: tuple[int, int]) -> jax.Array:
    """Bool [height, width], where pixels lie in a box whose upper left corner is given."""
    rows, columns = (
        (places >= start) & (places < start + side)
        for start, side, places in zip(corner, box, map(_places, size), strict=True)
    )
    return rows[:, None] & columns[None]


def _places(pixels: int) -> jax.Array:
    return jnp.arange(pixels, dtype=jnp.float32)


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Labels int32 [B] to probabilities, float32 [B, classes], of which `smoothing` is shared out among all classes."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mix each image with its neighbour in the batch, and their targets by the same shares.

    Neighbours are the 1st and 2nd, the 3rd and 4th, and so on: shuffled data make them strangers, and they lie on one
    device wherever it holds an even number of images. Each image draws its own share, and where both ways are on, its
    own way: mixup adds the two, cutmix pastes a rectangle of the other.

    Args:
        images: [B, H, W, C], B even.
        targets: [B, classes].
        keys: [B].
        mixup, cutmix: parameters of the beta distributions that shares are drawn from; 0 turns each off.
    """
    if not mixup and not cutmix:
        return images, targets
    size = (images.shape[1], images.shape[2])

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much of the image itself stays, at each pixel [H, W, 1], and on the whole []."""
        which, share, top, left = jax.random.split(key, 4)
        added = jax.random.beta(share, mixup or 1.0, mixup or 1.0)
        beta = jax.random.beta(share, cutmix or 1.0, cutmix or 1.0)
        # The box may leave the image, which makes the share pasted smaller: it is counted as it is.
        sides = tuple(jnp.floor(pixels * jnp.sqrt(1 - beta)) for pixels in size)
        centers = tuple(jnp.floor(jax.random.uniform(k) * pixels) for k, pixels in zip((top, left), size, strict=True))
        corner = tuple(center - jnp.floor(side / 2) for center, side in zip(centers, sides, strict=True))
        stays = 1 - _inside(corner, sides, size).astype(jnp.float32)
        paste = jax.random.bernoulli(which) if mixup and cutmix else jnp.asarray(bool(cutmix))
        weight = jnp.where(paste, stays, added)
        return weight[..., None], weight.mean()

    weights, shares = jax.vmap(draw)(keys)
    return _with_neighbor(images, weights), _with_neighbor(targets, shares[:, None])


def _with_neighbor(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of each of [B, ...] and its neighbour."""
    neighbors = values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)
    return weights * values + (1 - weights) * neighbors


def _channels(values: Sequence[float], images: jax.Array) -> jax.Array:
    """One number a channel, shaped to meet [..., C], or patches of n pixels, [..., n * C]."""
    repeated = np.tile(np.asarray(values, np.float32), images.shape[-1] // len(values))
    return jnp.asarray(repeated).reshape((1,) * (images.ndim - 1) + (-1,))
