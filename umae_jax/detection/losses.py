"""Losses that several heads share, in float32."""

import jax
import jax.numpy as jnp


def smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    """Return error ** 2 / (2 beta) where |error| < beta, else |error| - beta / 2."""
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)
