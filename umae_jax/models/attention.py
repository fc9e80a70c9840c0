"""Softmax attention in its plain form. `kernels` holds faster forms for each platform, which are tested against it.

Tokens are the last axis: queries [..., heads, d, Q], keys and values [..., heads, d, K], pairs [..., heads, K, Q].
"""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax.models.windows import Windows


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Compute attention, [..., heads, d, Q], with the softmax over keys in float32 and a bias added to its logits."""
    logits = jnp.einsum("...dk,...dq->...kq", k, q, preferred_element_type=jnp.float32) * q.shape[-2] ** -0.5
    weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-2)
    return jnp.einsum("...dk,...kq->...dq", v, weights.astype(v.dtype))


def self_attention(qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, heads: int, first_query: int = 0) -> jax.Array:
    """Compute attention of the tokens from `first_query` on to all tokens: [B, N, C] -> [B, N - first_query, C]."""
    q, k, v = split_heads(qkv, x, 3, heads, first_query)
    return merge_heads(proj, attend(q, k, v))


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, heads: int
) -> jax.Array:
    """Compute attention within the windows of a map, [B, H, W, C] -> [B, H, W, C].

    `tables` is the position bias of each case, float32 [9 or 1, 1 or windows, heads, N keys, N queries].
    """
    q, k, v = split_heads(qkv, windows.partition(x), 3, heads)
    return windows.reverse(merge_heads(proj, attend(q, k, v, windows.pair_bias(tables))), x.shape[1:3])


def split_heads(
    linear: nnx.Linear, x: jax.Array, parts: int, heads: int, first_query: int = 0
) -> tuple[jax.Array, ...]:
    """Apply a linear layer and split its output, [..., N, C] -> `parts` arrays [..., heads, d, N].

    The first part, the queries, starts at token `first_query`. A product per part yields the layout of attention.
    """
    kernel = linear.kernel[...].reshape(x.shape[-1], parts, heads, -1).astype(linear.dtype)
    bias = bias_of(linear).reshape(parts, *(1,) * (x.ndim - 2), heads, -1, 1)
    x = x.astype(linear.dtype)
    inputs = [x[..., first_query:, :], *(parts - 1) * [x]]
    return tuple(jnp.einsum("...nc,chd->...hdn", x, kernel[:, part]) + bias[part] for part, x in enumerate(inputs))


def merge_heads(linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """Apply a linear layer to the concatenated heads: [..., heads, d, N] -> [..., N, C]."""
    kernel = linear.kernel[...].reshape(*x.shape[-3:-1], -1).astype(linear.dtype)
    bias = bias_of(linear).reshape(*(1,) * (x.ndim - 2), -1)
    return jnp.einsum("...hdn,hdc->...nc", x.astype(linear.dtype), kernel) + bias


def bias_of(linear: nnx.Linear) -> jax.Array:
    """Return the bias of a linear layer in its dtype; every layer here has one."""
    return cast(nnx.Param[jax.Array], linear.bias)[...].astype(linear.dtype)
