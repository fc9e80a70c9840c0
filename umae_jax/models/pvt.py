"""The PVT encoder of UM-MAE (SPEC 4): global attention to a pooled map, no windows."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import require
from umae_jax.masking import Mask
from umae_jax.models import kernels, layers
from umae_jax.models.attention import merge_heads, split_heads
from umae_jax.models.encoder import Encoder, Features, uniform
from umae_jax.models.positions_table import PositionTable
from umae_jax.models.sizes import Sizes, Stage
from umae_jax.patches import patchify


class PooledAttention(nnx.Module):
    """Queries from every token; keys and values from the map after average pooling, a linear layer and a norm."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.q = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.reduce = layers.convolution(width, width, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.kv = layers.linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, reduction: int) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]; there are H / reduction x W / reduction keys and values."""
        batch, height, width, channels = x.shape
        (q,) = split_heads(self.q, x.reshape(batch, -1, channels), 1, self.heads)  # [B, heads, d, Q]
        pooled = x.reshape(batch, height // reduction, reduction, width // reduction, reduction, channels)
        pooled = self.norm(self.reduce(pooled.mean((2, 4)))).reshape(batch, -1, channels)
        k, v = split_heads(self.kv, pooled, 2, self.heads)  # [B, heads, d, K]
        return merge_heads(self.proj, kernels.attend(q, k, v)).reshape(x.shape)


class PvtBlock(kernels.Block):
    """x + pooled attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, stage: Stage, drop: layers.DropPath, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = stage.width
        self.drop = drop
        self.norm1 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.attention = PooledAttention(width, stage.heads, dtype=dtype, rngs=rngs)
        self.norm2 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.mlp = layers.Mlp(width, stage.mlp_ratio * width, dtype=dtype, rngs=rngs)

    def forward(self, x: jax.Array, reduction: int, drop_keys: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        with jax.named_scope("attention"):
            x = x + self.drop(self.attention(self.norm1(x), reduction), drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)


class PvtStage(nnx.Module):
    """Blocks of one width and resolution, after a 2 x 2 convolution of stride 2 unless it is the first."""

    def __init__(self, stage: Stage, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inputs, width = stage.inputs, stage.width
        self.merge = None if inputs is None else layers.convolution(inputs, width, side=2, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(PvtBlock(stage, drop, dtype=dtype, rngs=rngs) for drop in stage.drops)

    def __call__(self, x: jax.Array, reduction: int, drop_keys: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', C'], half the size after a convolution."""
        if self.merge is not None:
            with jax.named_scope("merge"):
                x = self.merge(patchify(x, 2))
        for block in self.blocks:
            x = block(x, reduction, drop_keys)
        return x


class Pvt(Encoder):
    """PVT with average pooling for keys and values.

    Args:
        sr_ratios: for each stage, the side of the blocks pooled for keys and values on a whole image; half that, but
            at least 1, on the compact grid. Another number than of stages raises a UserError.
        grid, learned_positions: of its `PositionTable`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        grid: tuple[int, int],
        sr_ratios: Sequence[int],
        learned_positions: bool,
        final_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(sizes, patch_norm=False, final_norm=final_norm, dtype=dtype, rngs=rngs)
        count, stages = len(sr_ratios), len(sizes.depths)
        require(count == stages, f"model.sr_ratios has {count} number(s), model.depths {stages}; write one per stage")
        self.sr_ratios = tuple(sr_ratios)
        self.positions = PositionTable(sizes.widths[0], grid, learned=learned_positions)
        self.stages = nnx.List(PvtStage(stage, dtype=dtype, rngs=rngs) for stage in sizes.stages())

    def _reductions(self, compact: bool) -> tuple[int, ...]:
        return tuple(max(1, reduction // 2) for reduction in self.sr_ratios) if compact else self.sr_ratios

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Raise a UserError unless sr_ratios divide the grid at every stage."""
        for stage, reduction in enumerate(self._reductions(compact)):
            rows, columns = (size // 2**stage for size in grid)
            where = f"stage {stage + 1}{' on the compact grid (half of model.sr_ratios)' if compact else ''}"
            message = f"model.sr_ratios: {reduction} does not divide the {rows} x {columns} tokens of {where}"
            fitting = tuple(2**halvings for halvings in reversed(range(len(self.widths))))
            require(rows % reduction == columns % reduction == 0, f"{message}; choose {fitting}")

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """See `Encoder.__call__`."""
        self.check_grid((tokens.shape[1], tokens.shape[2]), compact=mask is not None)
        x = tokens + self.positions(tokens, mask if mask is None else uniform(mask))
        maps = []
        reductions = self._reductions(mask is not None)
        for number, (stage, reduction) in enumerate(zip(self.stages, reductions, strict=True), 1):
            with jax.named_scope(f"stage_{number}"):
                x = stage(x, reduction, drop_keys)
            maps.append(x)
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        return Features(tuple(maps))
