"""Everything machine-specific, behind one switch: the functions below choose an implementation by platform and size.

`models/attention.py` shows the computation; `softmax`, `packed_windows` and `pallas_tpu` are its fast forms.
"""

from typing import Any

import jax
from flax import nnx

from umae_jax.errors import require
from umae_jax.models.attention import merge_heads, split_heads
from umae_jax.models.kernels import packed_windows
from umae_jax.models.kernels.platforms import compiler_options, row_major
from umae_jax.models.kernels.softmax import attend
from umae_jax.models.windows import Windows

__all__ = [
    "REMATERIALIZE",
    "Block",
    "attend",
    "check_platform",
    "compiler_options",
    "row_major",
    "self_attention",
    "window_attention",
]

REMATERIALIZE = {  # activations of a block that are saved for its backward pass, which computes the others again
    "none": None,  # all that the backward pass reads
    "pairs": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the outputs of linear layers
    "blocks": jax.checkpoint_policies.nothing_saveable,  # the block's input alone
}


class Block(nnx.Module):
    """A residual block; its subclass computes `forward`.

    Attributes:
        rematerialize: a key of `REMATERIALIZE`.
        fused_attention: use the Pallas kernel for attention where it supports the sizes (TPU only).
    """

    rematerialize = "none"
    fused_attention = False

    def forward(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """Compute the next map of tokens."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """Compute `forward`, saving for the backward pass what `rematerialize` says."""

        def forward(x: jax.Array) -> jax.Array:
            return self.forward(x, *args, **kwargs)

        policy = REMATERIALIZE[self.rematerialize]
        return forward(x) if policy is None else jax.checkpoint(forward, policy=policy)(x)


def check_platform(device: jax.Device, *, fused: bool) -> None:
    """Check that a kind of device runs the kernels that a configuration asks for.

    Raises:
        UserError: if the Pallas kernel is to run elsewhere than on a TPU.
    """
    require(
        device.platform == "tpu" or not fused,
        f"fused_attention: the kernel runs on TPUs, not on {device.platform} devices; set it to False",
    )


def self_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, heads: int, first_query: int = 0, *, fused: bool
) -> jax.Array:
    """See `attention.self_attention`; `fused` asks for the Pallas kernel where it supports the sizes."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu  # imported only where it is asked for

        if pallas_tpu.supports_all(x.shape[1], first_query, x.shape[2], heads):
            return pallas_tpu.self_attention(qkv, proj, x, heads, first_query)
    q, k, v = split_heads(qkv, x, 3, heads, first_query)
    return merge_heads(proj, attend(q, k, v))


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, heads: int, *, fused: bool
) -> jax.Array:
    """See `attention.window_attention`; `fused` asks for the Pallas kernel where it supports the sizes."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu

        if pallas_tpu.supports_windows(x.shape, windows, heads):
            return pallas_tpu.window_attention(qkv, proj, x, windows, tables)
    return packed_windows.window_attention(qkv, proj, x, windows, tables, heads)
