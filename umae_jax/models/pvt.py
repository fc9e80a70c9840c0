"""The PVT encoder of UM-MAE (SPEC 4): global attention to a pooled map, no windows."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import require
from umae_jax.masking import Mask
from umae_jax.models import kernels, layers
from umae_jax.models.attention import merge_heads, split_heads
from umae_jax.models.encoder import Encoder, Features, require_uniform
from umae_jax.models.positions_table import PositionTable
from umae_jax.models.sizes import Sizes, Stage
from umae_jax.patches import patchify


class PooledAttention(nnx.Module):
    """Attention with queries from all tokens, and keys and values from the average-pooled map."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.q = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.reduce = layers.convolution(width, width, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.kv = layers.linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, sr_ratio: int) -> jax.Array:
        """Attend, [B, H, W, C] -> [B, H, W, C], to H // sr_ratio x W // sr_ratio keys and values."""
        batch, height, width, channels = x.shape
        (q,) = split_heads(self.q, x.reshape(batch, -1, channels), 1, self.heads)  # [B, heads, d, Q]
        pooled = layers.crop_to_multiple(x, sr_ratio)
        pooled = pooled.reshape(batch, height // sr_ratio, sr_ratio, width // sr_ratio, sr_ratio, channels)
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

    def forward(self, x: jax.Array, sr_ratio: int, drop_keys: jax.Array | None) -> jax.Array:
        """Apply the block, [B, H, W, C] -> [B, H, W, C]."""
        with jax.named_scope("attention"):
            x = x + self.drop(self.attention(self.norm1(x), sr_ratio), drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)


class PvtStage(nnx.Module):
    """Blocks of one width and resolution, after a 2 x 2 convolution of stride 2 unless it is the first."""

    def __init__(self, stage: Stage, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inputs, width = stage.inputs, stage.width
        self.merge = None if inputs is None else layers.convolution(inputs, width, side=2, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(PvtBlock(stage, drop, dtype=dtype, rngs=rngs) for drop in stage.drops)

    def __call__(self, x: jax.Array, sr_ratio: int, drop_keys: jax.Array | None) -> jax.Array:
        """Apply the stage, [B, H, W, C] -> [B, H', W', C']; a convolution halves the height and width, rounded down."""
        if self.merge is not None:
            with jax.named_scope("merge"):
                x = self.merge(patchify(layers.crop_to_multiple(x, 2), 2))
        for block in self.blocks:
            x = block(x, sr_ratio, drop_keys)
        return x


class Pvt(Encoder):
    """PVT with average pooling for keys and values.

    Args:
        sr_ratios: for each stage, the side in tokens of the squares that keys and values are pooled over on a whole
            image. It is halved on the compact grid, but at least 1.
        grid, learned_positions, dense: arguments of `PositionTable`. In dense prediction, sr_ratios need not divide the
            maps: the last rows and columns that fill no square are no keys and values.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        grid: tuple[int, int],
        sr_ratios: Sequence[int],
        learned_positions: bool,
        dense: bool = False,
        final_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(sizes, patch_norm=None, final_norm=final_norm, dtype=dtype, rngs=rngs)
        count, stages = len(sr_ratios), len(sizes.depths)
        require(count == stages, f"model.sr_ratios has {count} number(s), model.depths {stages}; write one per stage")
        self.sr_ratios = tuple(sr_ratios)
        self.dense = dense
        self.positions = PositionTable(sizes.widths[0], grid, learned=learned_positions, dense=dense)
        self.stages = nnx.List(PvtStage(stage, dtype=dtype, rngs=rngs) for stage in sizes.stages())

    def _sr_ratios(self, compact: bool) -> tuple[int, ...]:
        return tuple(max(1, sr_ratio // 2) for sr_ratio in self.sr_ratios) if compact else self.sr_ratios

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Raise a UserError unless sr_ratios divide the grid at every stage, in dense prediction unless they fit in."""
        for stage, sr_ratio in enumerate(self._sr_ratios(compact)):
            rows, columns = (size // 2**stage for size in grid)
            location = f"stage {stage + 1}{' on the compact grid (half of model.sr_ratios)' if compact else ''}"
            message = f"model.sr_ratios: {sr_ratio} does not divide the {rows} x {columns} tokens of {location}"
            valid = tuple(2**exponent for exponent in reversed(range(len(self.widths))))
            fits = min(rows, columns) >= sr_ratio if self.dense else rows % sr_ratio == columns % sr_ratio == 0
            require(fits, f"{message}; choose {valid}")

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """See `Encoder.__call__`."""
        self.check_grid((tokens.shape[1], tokens.shape[2]), compact=mask is not None)
        x = tokens + self.positions(tokens, mask if mask is None else require_uniform(mask))
        maps = []
        sr_ratios = self._sr_ratios(mask is not None)
        for number, (stage, sr_ratio) in enumerate(zip(self.stages, sr_ratios, strict=True), 1):
            with jax.named_scope(f"stage_{number}"):
                x = self.apply_stage(stage, x, sr_ratio, drop_keys)
            maps.append(x)
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        return Features(tuple(maps))
