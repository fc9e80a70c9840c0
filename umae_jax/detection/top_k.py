"""The largest numbers of an array by counting: sorts of many numbers take the TPU compiler minutes."""

import jax
import jax.numpy as jnp
from jax import lax

BITS = 32


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest numbers, the largest first, and their places, as `lax.top_k` does.

    The smallest of them is found bit by bit: 32 times, all numbers are compared with a threshold. Of equal numbers the
    lower places come first.

    Args:
        x: float32 or int32 [N], without NaN.
        count: at most N; the time also grows with its square.

    Returns:
        Numbers [count] and places int32 [count].
    """
    keys = _ordered(x)

    def add_bit(number: jax.Array, threshold: jax.Array) -> jax.Array:
        raised = threshold | (jnp.uint32(1) << (BITS - 1 - number).astype(jnp.uint32))
        return jnp.where((keys >= raised).sum() >= count, raised, threshold)

    smallest = lax.fori_loop(0, BITS, add_bit, jnp.uint32(0))
    larger, equal = keys > smallest, keys == smallest
    chosen = larger | (equal & (jnp.cumsum(equal) <= count - larger.sum()))
    place = jnp.searchsorted(jnp.cumsum(chosen), jnp.arange(1, count + 1)).astype(jnp.int32)
    found = keys[place]
    row = jnp.arange(count)
    before = (found[None] > found[:, None]) | ((found[None] == found[:, None]) & (row[None] < row[:, None]))
    place = jnp.zeros(count, jnp.int32).at[before.sum(1)].set(place, unique_indices=True)
    return x[place], place


def _ordered(x: jax.Array) -> jax.Array:
    """Return uint32 [N] in the same order."""
    sign = jnp.uint32(1 << (BITS - 1))
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    if x.dtype == jnp.int32:
        return bits ^ sign
    zero_is_positive = jnp.where(x == 0, jnp.uint32(0), bits)
    return jnp.where(zero_is_positive >= sign, ~zero_is_positive, zero_is_positive | sign)
