"""Layers that every model shares, with the initialisation of SPEC 9.

Parameters are float32. Linear layers compute in the model's dtype; layer norms, softmax and attention bias in float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.models import kernels

NORM_EPSILON = 1e-6
PYRAMID_EPSILON = 1e-5  # of the norms inside the blocks of Swin and PVT
TOKEN_STD = 0.02
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()


def linear(
    inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs, kernel_init: nnx.Initializer = XAVIER_UNIFORM
) -> nnx.Linear:
    """Build a linear layer with bias 0: [..., inputs] -> [..., outputs]."""
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)


def convolution(inputs: int, outputs: int, *, side: int = 1, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Build a convolution of kernel size and stride `side`, as a linear layer on the patches of `patchify`."""
    kernel_init = nnx.initializers.normal((2 / (side**2 * outputs)) ** 0.5)
    return linear(side**2 * inputs, outputs, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


def layer_norm(width: int, *, epsilon: float = NORM_EPSILON, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Build a layer norm over the last axis, computed and returned in float32."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def crop_to_multiple(x: jax.Array, side: int) -> jax.Array:
    """Drop the last rows and columns of [B, H, W, C] that make H or W no multiple of `side`."""
    return x[:, : x.shape[1] // side * side, : x.shape[2] // side * side]


def token(width: int, *, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """Build a learned token [1, 1, width]: not one-dimensional, so that it takes weight decay as in the reference."""
    return nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (1, 1, width), jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """Compute the exact GELU in float32 by erf; `jax.nn.gelu` uses erfc, whose two branches are both computed."""
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth of one block: drops each of its two branches per image with probability `rate`."""

    rate: float = 0.0
    block: int = 0

    def __call__(self, x: jax.Array, keys: jax.Array | None, branch: int) -> jax.Array:
        """Zero a branch's output [B, ...] for some images and scale up the others; without keys [B] return it."""
        if keys is None or self.rate == 0:
            return x

        def keep(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, 2 * self.block + branch), 1 - self.rate)

        kept = jax.vmap(keep)(keys).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


NO_DROP = DropPath()


class Mlp(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        return self.fc2(gelu(self.fc1(x)))


class TransformerBlock(kernels.Block):
    """A pre-norm ViT block with global attention."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, *, drop: DropPath = NO_DROP, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.heads = heads
        self.drop = drop
        self.norm1 = layer_norm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.mlp = Mlp(width, mlp_ratio * width, dtype=dtype, rngs=rngs)

    def forward(self, x: jax.Array, first_query: int = 0, drop_keys: jax.Array | None = None) -> jax.Array:
        """Update and return the tokens from `first_query` on: [B, N, C] -> [B, N - first_query, C].

        All tokens are keys and values, so the returned tokens do not depend on `first_query`.
        """
        with jax.named_scope("attention"):
            attended = kernels.self_attention(
                self.qkv, self.proj, self.norm1(x), self.heads, first_query, fused=self.fused_attention
            )
            x = x[:, first_query:] + self.drop(attended, drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)
