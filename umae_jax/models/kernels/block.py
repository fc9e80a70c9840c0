"""Residual blocks with their settings for a machine: memory against recomputation, and the fused kernel."""

from typing import Any

import jax
from flax import nnx

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
