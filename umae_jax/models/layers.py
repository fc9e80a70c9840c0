"""What every transformer here is made of, with the initialisation of SPEC 9.

Precision: parameters are float32; linear layers compute in the model's dtype; layer norms, softmax and the bias of
attention in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.masking import Mask
from umae_jax.models.attention import attend, merge_heads, split_channels, split_heads
from umae_jax.models.kernels import pallas_tpu
from umae_jax.positions import sincos_table

NORM_EPSILON = 1e-6
PYRAMID_EPSILON = 1e-5  # of the norms inside the blocks of Swin and PVT
TOKEN_STD = 0.02
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()
REMATERIALIZE = {  # what of a block is saved for its backward pass, which computes the rest again
    "none": None,  # all that it needs
    "pairs": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # what linear layers put out
    "blocks": jax.checkpoint_policies.nothing_saveable,  # what goes into the block
}


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = XAVIER_UNIFORM,
) -> nnx.Linear:
    """A linear layer with bias 0: [..., inputs] -> [..., outputs]."""
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)


def convolution_init(kernel_area: int, outputs: int) -> nnx.Initializer:
    """The initialiser of a convolution written as a linear layer: std sqrt(2 / fan_out), fan_out = area * outputs."""
    return nnx.initializers.normal((2 / (kernel_area * outputs)) ** 0.5)


def layer_norm(width: int, *, epsilon: float = NORM_EPSILON, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm over the last axis, computed and returned in float32, by mean and mean square of one pass."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def token(width: int, *, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """A learned token [1, 1, width]: not a vector, so that weight decay treats it as the reference does."""
    return nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (1, 1, width), jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, in float32. By erf: `jax.nn.gelu` takes erfc, of which both branches are computed."""
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth of one block: each of its two branches is left out for an image at this rate, in training."""

    rate: float = 0.0
    block: int = 0

    def __call__(self, x: jax.Array, keys: jax.Array | None, branch: int) -> jax.Array:
        """Zero a branch's output [B, ...] for some images and scale it up for the others; as it is without keys [B]."""
        if keys is None or self.rate == 0:
            return x

        def keep(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, 2 * self.block + branch), 1 - self.rate)

        kept = jax.vmap(keep)(keys).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


def drop_paths(rate: float, depths: Sequence[int]) -> list[list[DropPath]]:
    """For each stage, that of each of its blocks: rising linearly from 0 to `rate` over all blocks (SPEC 8)."""
    rates = np.linspace(0, rate, sum(depths))
    drops = [DropPath(float(value), block) for block, value in enumerate(rates)]
    return [drops[sum(depths[:stage]) : sum(depths[: stage + 1])] for stage in range(len(depths))]


def resize_positions(table: jax.Array, old: tuple[int, int], new: tuple[int, int], *, leading: int = 0) -> jax.Array:
    """The position embeddings of a grid from those of another, bicubic and antialiased.

    Args:
        table: [1, leading + old rows * columns, C].
        old, new: rows and columns.
        leading: rows of the table that belong to no place, and stay.

    Returns:
        [1, leading + new rows * columns, C].
    """
    if old == new:
        return table
    width = table.shape[-1]
    resized = jax.image.resize(table[:, leading:].reshape(1, *old, width), (1, *new, width), "cubic")
    return jnp.concatenate([table[:, :leading], resized.reshape(1, -1, width)], axis=1)


class PositionTable(nnx.Module):
    """The absolute position embedding of a grid of patches (SPEC 4, 5): the sin-cos table, fixed or learned from there.

    On a grid other than its own the table is resized, bicubically and antialiased.

    Args:
        width: of a token.
        grid: rows and columns of the full grid.
        class_token: whether a class token goes before, at position 0.
        learned: whether the table is a parameter, [1, class token and patches, width], or fixed.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, class_token: bool = False, learned: bool = False) -> None:
        self.width = width
        self.grid = grid
        self.leading = int(class_token)
        self.table = nnx.Param(jnp.asarray(self.fixed())) if learned else None

    def fixed(self) -> np.ndarray:
        """The sin-cos table, float32 [1, class token and patches, width]; zeros for the class token."""
        table = sincos_table(self.width, self.grid).reshape(-1, self.width)
        return np.pad(table, ((self.leading, 0), (0, 0)))[None]

    def _values(self) -> jax.Array:
        return jnp.asarray(self.fixed()) if self.table is None else self.table[...]

    def of_class_token(self) -> jax.Array:
        """[1, 1, width]."""
        return self._values()[:, : self.leading]

    def __call__(self, tokens: jax.Array, mask: Mask | None) -> jax.Array:
        """The positions of a map of tokens [B, rows, columns, width], compact if a mask is given: [B or 1, ...] alike.

        In compaction each token takes the embedding of its original place.
        """
        rows, columns = (size * (1 if mask is None else 2) for size in tokens.shape[1:3])
        table = resize_positions(self._values()[:, self.leading :], self.grid, (rows, columns))
        table = table.reshape(1, rows, columns, self.width)
        return (table if mask is None else mask.compact(table)).astype(tokens.dtype)


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        return self.fc2(gelu(self.fc1(x)))


class Block(nnx.Module):
    """A residual block: what it computes is its subclass's `forward`.

    Attributes:
        rematerialize: a key of `REMATERIALIZE`.
        fused_attention: whether attention is a kernel for TPUs, where there is one that takes it.
    """

    rematerialize = "none"
    fused_attention = False

    def forward(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """A map of tokens to the next."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:  # noqa: ANN401
        """`forward`, of which only so much is saved for the backward pass."""

        def forward(x: jax.Array) -> jax.Array:
            return self.forward(x, *args, **kwargs)

        policy = REMATERIALIZE[self.rematerialize]
        return forward(x) if policy is None else jax.checkpoint(forward, policy=policy)(x)


class TransformerBlock(Block):
    """A plain pre-norm ViT block with global attention."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        *,
        drop: DropPath = DropPath(),
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads = heads
        self.drop = drop
        self.norm1 = layer_norm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.mlp = Mlp(width, mlp_ratio * width, dtype=dtype, rngs=rngs)

    def forward(self, x: jax.Array, first_query: int = 0, drop_keys: jax.Array | None = None) -> jax.Array:
        """[B, N, C] -> [B, N - first_query, C]: only tokens from `first_query` on are updated and returned.

        All tokens serve as keys and values, so the tokens returned are the same whatever `first_query` is.
        """
        with jax.named_scope("attention"):
            normed = self.norm1(x)
            if self.fused_attention and pallas_tpu.takes_all(x.shape[1], first_query, x.shape[2], self.heads):
                (q, k, v), biases = split_channels(self.qkv, normed, 3)  # [B, N, C]
                attended = self.proj(pallas_tpu.attend_to_all((q[:, first_query:], k, v), biases, self.heads))
            else:
                q, k, v = split_heads(self.qkv, normed, 3, self.heads, first_query=first_query)  # [B, heads, d, N]
                attended = merge_heads(self.proj, attend(q, k, v))
            x = x[:, first_query:] + self.drop(attended, drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)
