"""All platform-specific code. The functions below choose an implementation by platform and size.

`models/attention.py` shows the computation; `softmax`, `packed_windows` and `pallas_tpu` are its fast forms.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from umae_jax.errors import require
from umae_jax.models.attention import merge_heads, split_heads
from umae_jax.models.kernels import packed_windows
from umae_jax.models.kernels.platforms import compiler_options, row_major
from umae_jax.models.kernels.softmax import attend
from umae_jax.models.windows import Windows

REMATERIALIZE = {  # the activations of a block that are saved for its backward pass, which recomputes the others
    "none": None,  # all that the backward pass needs
    "pairs": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the outputs of linear layers
    "blocks": jax.checkpoint_policies.nothing_saveable,  # the block's input alone
    "stages": jax.checkpoint_policies.nothing_saveable,  # likewise, while its stage is recomputed; see `Stages`
}


class Block(nnx.Module):
    """A residual block; a subclass defines `forward`."""

    rematerialize = "none"  # a key of `REMATERIALIZE`
    fused_attention = False  # TPU: use the Pallas kernel for attention if it supports the sizes

    def forward(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """Compute the next map of tokens."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """Compute `forward`; the backward pass recomputes activations as `rematerialize` says."""

        def forward(x: jax.Array) -> jax.Array:
            return self.forward(x, *args, **kwargs)

        policy = REMATERIALIZE[self.rematerialize]
        return forward(x) if policy is None else jax.checkpoint(forward, policy=policy)(x)


class Stages(nnx.Module):
    """A module that applies stages, each of several blocks."""

    rematerialize = "none"  # a key of `REMATERIALIZE`

    def apply_stage(self, stage: Callable[..., jax.Array], x: jax.Array, *args: Any) -> jax.Array:  # noqa: ANN401
        """Compute `stage(x, *args)`; if `rematerialize` is "stages", the backward pass recomputes it from `x`."""

        def forward(x: jax.Array) -> jax.Array:
            return stage(x, *args)

        return jax.checkpoint(forward)(x) if self.rematerialize == "stages" else forward(x)


def check_platform(device: jax.Device, *, fused: bool) -> None:
    """Raise a UserError if the Pallas kernel is enabled on another device than a TPU."""
    message = f"fused_attention: the kernel runs on TPUs, not on {device.platform} devices; set it to False"
    require(device.platform == "tpu" or not fused, message)


def self_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, heads: int, first_query: int = 0, *, fused: bool
) -> jax.Array:
    """See `attention.self_attention`; `fused` enables the Pallas kernel for the sizes that it supports."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu  # imported only where it is used

        if pallas_tpu.supports_all(x.shape[1], first_query, x.shape[2], heads):
            return pallas_tpu.self_attention(qkv, proj, x, heads, first_query)
    q, k, v = split_heads(qkv, x, 3, heads, first_query)
    return merge_heads(proj, attend(q, k, v))


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, heads: int, *, fused: bool
) -> jax.Array:
    """See `attention.window_attention`; `fused` enables the Pallas kernel for the sizes that it supports."""
    if fused:
        from umae_jax.models.kernels import pallas_tpu

        if pallas_tpu.supports_windows(x.shape, windows, heads):
            return pallas_tpu.window_attention(qkv, proj, x, windows, tables)
    return packed_windows.window_attention(qkv, proj, x, windows, tables, heads)
