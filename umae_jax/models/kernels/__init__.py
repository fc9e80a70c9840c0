"""Everything machine-specific, behind one switch: the functions below choose an implementation by platform and size.

`models/attention.py` says what they compute; `softmax`, `packed_windows` and `pallas_tpu` compute it fast.
"""

import jax
from flax import nnx

from umae_jax.models.attention import merge_heads, split_heads
from umae_jax.models.kernels import packed_windows, softmax
from umae_jax.models.kernels.block import REMATERIALIZE, Block
from umae_jax.models.kernels.platforms import compiler_options, row_major
from umae_jax.models.windows import Windows

__all__ = [
    "REMATERIALIZE",
    "Block",
    "attend",
    "compiler_options",
    "row_major",
    "self_attention",
    "window_attention",
]


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """See `attention.attend`."""
    return softmax.attend(q, k, v)


def self_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, heads: int, first_query: int = 0, *, fused: bool
) -> jax.Array:
    """See `attention.self_attention`; `fused` asks for the Pallas kernel where it supports the sizes."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu  # imported only where it is asked for

        if pallas_tpu.supports_all(x.shape[1], first_query, x.shape[2], heads):
            return pallas_tpu.self_attention(qkv, proj, x, heads, first_query)
    q, k, v = split_heads(qkv, x, 3, heads, first_query)
    return merge_heads(proj, softmax.attend(q, k, v))


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, heads: int, *, fused: bool
) -> jax.Array:
    """See `attention.window_attention`; `fused` asks for the Pallas kernel where it supports the sizes."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu

        if pallas_tpu.supports_windows(x.shape, windows, heads):
            return pallas_tpu.window_attention(qkv, proj, x, windows, tables)
    return packed_windows.window_attention(qkv, proj, x, windows, tables, heads)
