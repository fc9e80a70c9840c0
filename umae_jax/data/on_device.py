"""On the device: from a uint8 batch to what a model sees. Every random draw belongs to its image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def sample_keys(seed: int, index: jax.Array) -> jax.Array:
    """One key a sample, from the run's seed and the global sample index: uint32 [B] -> keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirror each image [B, H, W, C] left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 0..255 to float32 of zero mean and unit variance, channel by channel: [..., C]."""
    return (images.astype(jnp.float32) / 255 - _channels(mean, images)) / _channels(std, images)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The inverse of `normalize`, rounded and clipped: float32 [..., C] to uint8."""
    pixels = images * _channels(std, images) + _channels(mean, images)
    return jnp.clip(jnp.round(pixels * 255), 0, 255).astype(jnp.uint8)


def _channels(values: Sequence[float], images: jax.Array) -> jax.Array:
    """One number a channel, shaped to meet [..., C]."""
    return jnp.asarray(values, jnp.float32).reshape((1,) * (images.ndim - 1) + (-1,))
