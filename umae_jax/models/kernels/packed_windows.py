"""Attention within windows. On TPUs, small windows are packed together to fill the lanes (see `softmax`)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umae_jax.models.attention import bias_of, merge_heads, split_heads
from umae_jax.models.kernels.platforms import LANES, tracing_for
from umae_jax.models.kernels.softmax import attend
from umae_jax.models.windows import Windows
from umae_jax.positions import select_offset_case


def windows_per_tile(windows: int, tokens: int) -> int:
    """Return the number of neighbouring windows to pack into one tile, a divisor of `windows`; 1 except on TPUs."""
    return math.gcd(windows, max(1, LANES // tokens)) if tracing_for("tpu") else 1


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, heads: int
) -> jax.Array:
    """Compute `attention.window_attention`."""
    tokens = windows.partition(x)
    packed = windows_per_tile(*tokens.shape[1:3])
    q, k, v = split_heads(qkv, tokens, 3, heads) if packed == 1 else _split_packed(qkv, tokens, heads, packed)
    attended = attend(q, k, v, tables, lambda tables: _pair_bias(tables, windows, packed), packed)
    return windows.reverse(merge_heads(proj, attended), x.shape[1:3])


def _split_packed(linear: nnx.Linear, x: jax.Array, heads: int, packed: int) -> tuple[jax.Array, ...]:
    """Compute `split_heads` for packed windows, given [..., windows, N, C].

    Return queries [..., tiles, heads, d, packed * N], and keys and values [..., tiles, heads, packed * d, N].
    """
    kernel = linear.kernel[...].reshape(x.shape[-1], 3, heads, -1).astype(linear.dtype)
    bias = bias_of(linear).reshape(3, *(1,) * (x.ndim - 2), heads, -1, 1)
    x = x.astype(linear.dtype)
    x = x.reshape(*x.shape[:-3], -1, packed, *x.shape[-2:])  # [..., tiles, packed, N, C]
    queries = jnp.einsum("...nc,chd->...hdn", x.reshape(*x.shape[:-3], -1, x.shape[-1]), kernel[:, 0]) + bias[0]
    stacked = (jnp.einsum("...snc,chd->...hsdn", x, kernel[:, i]) + bias[i][..., None, :, :] for i in (1, 2))
    return queries, *(part.reshape(*part.shape[:-3], -1, part.shape[-1]) for part in stacked)


def _pack(pairs: jax.Array, axis: int, packed: int) -> jax.Array:
    """Concatenate the queries of packed windows: [..., windows, ..., K, N] -> [..., tiles, ..., K, packed * N].

    `axis` is that of the windows. If its size is 1, all windows share one entry, which is repeated.
    """
    if packed == 1:
        return pairs
    if pairs.shape[axis] == 1:
        return jnp.concatenate([pairs] * packed, axis=-1)
    pairs = pairs.reshape(*pairs.shape[:axis], -1, packed, *pairs.shape[axis + 1 :])
    pairs = jnp.moveaxis(pairs, axis + 1, -2)  # [..., K, packed, N]
    return pairs.reshape(*pairs.shape[:-2], -1)


def _pair_bias(tables: jax.Array, windows: Windows, packed: int) -> jax.Array:
    """Compute `Windows.pair_bias` for packed windows."""
    bias = _pack(tables, 1, packed)
    if windows.offset_differences is not None:
        row_step, column_step = (_pack(step, 1, packed) for step in windows.offset_differences)
        select = _select_offset_case_on_cpu if tracing_for("cpu") else select_offset_case
        bias = select(bias, row_step, column_step)
    if windows.mask is not None:
        bias = bias + _pack(windows.mask, 0, packed)[None, :, None]
    return bias


# JAX's own gradient makes XLA:CPU pass over the data once per case. This one sums all cases in one pass, at a fraction
# of the cost. Devices that share a batch exchange only the sums.
_select_offset_case_on_cpu = jax.custom_vjp(select_offset_case)


def _forward(tables: jax.Array, row_step: jax.Array, column_step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return select_offset_case(tables, row_step, column_step), (tables, row_step, column_step)


def _backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    tables, row_step, column_step = residuals
    case = (3 * row_step + column_step + 4)[:, :, None]  # [B, windows, 1, N, N]
    zero = np.zeros((), gradient.dtype)
    grad_cases = [jnp.where(case == number, gradient, zero) for number in range(9)]
    shared = (0, 1) if tables.shape[1] == 1 else (0,)
    sums = jax.lax.reduce(grad_cases, [zero] * 9, lambda one, other: jax.tree.map(jnp.add, one, other), shared)
    return jnp.stack(sums).reshape(tables.shape), None, None


_select_offset_case_on_cpu.defvjp(_forward, _backward)
