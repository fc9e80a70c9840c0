"""On the device: from a uint8 batch to what a model sees. Every random draw belongs to its image."""

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


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 0..255 to float32 of zero mean and unit variance, channel by channel: [..., C]."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean_array = jnp.asarray(mean, jnp.float32).reshape(shape)
    std_array = jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean_array) / std_array


def denormalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """The inverse of `normalize`, rounded and clipped: float32 [..., C] to uint8."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean_array = jnp.asarray(mean, jnp.float32).reshape(shape)
    std_array = jnp.asarray(std, jnp.float32).reshape(shape)
    return jnp.clip(jnp.round((images * std_array + mean_array) * 255), 0, 255).astype(jnp.uint8)
