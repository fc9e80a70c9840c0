"""The Swin encoder of UM-MAE (SPEC 3): one class for compact grids and whole images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import require
from umae_jax.masking import Mask
from umae_jax.models import kernels, layers
from umae_jax.models.encoder import Encoder, Features, require_uniform
from umae_jax.models.sizes import Sizes, Stage
from umae_jax.models.windows import Windows, make_dense_windows, make_windows
from umae_jax.patches import patchify


class PositionBias(nnx.Module):
    """A small MLP that maps the coordinate difference of two tokens to one bias per head, in float32."""

    def __init__(self, heads: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = layers.convolution(2, hidden, dtype=jnp.float32, rngs=rngs)
        self.fc2 = layers.convolution(hidden, heads, dtype=jnp.float32, rngs=rngs)

    def __call__(self, windows: Windows) -> jax.Array:
        """Return the bias of each case: [9 or 1, 1 or windows, heads, N keys, N queries].

        The MLP runs over these cases only, never over the pairs of all windows and images (see `Windows.pair_bias`).
        """
        return self.fc2(jax.nn.relu(self.fc1(jnp.asarray(windows.differences)))).transpose(0, 1, 4, 2, 3)


class SwinBlock(kernels.Block):
    """x + window attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, stage: Stage, drop: layers.DropPath, *, position_width: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        width, self.heads = stage.width, stage.heads
        self.drop = drop
        self.norm1 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.position = PositionBias(self.heads, position_width, rngs=rngs)
        self.qkv = layers.linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.mlp = layers.Mlp(width, stage.mlp_ratio * width, dtype=dtype, rngs=rngs)

    def forward(self, x: jax.Array, windows: Windows, drop_keys: jax.Array | None) -> jax.Array:
        """Apply the block, [B, H, W, C] -> [B, H, W, C]."""
        with jax.named_scope("attention"):
            normed = self.norm1(x).astype(self.qkv.dtype)
            tables = self.position(windows)
            attended = kernels.window_attention(
                self.qkv, self.proj, normed, windows, tables, self.heads, fused=self.fused_attention
            )
            x = x + self.drop(attended, drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)


class Merge(nnx.Module):
    """Layer norm and a 2 x 2 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, *, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = layers.layer_norm(inputs, epsilon=epsilon, rngs=rngs)
        self.proj = layers.convolution(inputs, outputs, side=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Merge 2 x 2 tokens, [B, H, W, C] -> [B, H // 2, W // 2, C']; an odd last row or column is dropped."""
        with jax.named_scope("merge"):
            return self.proj(patchify(layers.crop_to_multiple(self.norm(x), 2), 2))


class SwinStage(nnx.Module):
    """Blocks of one width and resolution, after a merge unless it is the first; odd blocks shift their windows."""

    def __init__(
        self, stage: Stage, *, position_width: int, merge_epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        inputs, width = stage.inputs, stage.width
        self.merge = None if inputs is None else Merge(inputs, width, epsilon=merge_epsilon, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            SwinBlock(stage, drop, position_width=position_width, dtype=dtype, rngs=rngs) for drop in stage.drops
        )

    def __call__(self, x: jax.Array, windows: Sequence[Windows], drop_keys: jax.Array | None) -> jax.Array:
        """Apply the stage, [B, H, W, C] -> [B, H', W', C']; a merge halves the height and width.

        `windows` are those of even and of odd blocks.
        """
        if self.merge is not None:
            x = self.merge(x)
        for number, block in enumerate(self.blocks):
            x = block(x, windows[number % 2], drop_keys)
        return x


class Swin(Encoder):
    """Swin with convolutional merges and a position MLP over original coordinates.

    Args:
        window: side of a window in tokens on a whole image, which is padded if windows do not tile it. It is halved on
            the compact grid.
        position_width: hidden width of the position MLP.
        dense_grid: for dense prediction, rows and columns of patches of the largest image. Windows are no larger than
            the longer side of its map at each stage, and shifted if they are smaller; see `make_dense_windows`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        window: int,
        position_width: int,
        dense_grid: tuple[int, int] | None = None,
        final_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        # The reference's code for detection has another epsilon than that for pre-training.
        epsilon = layers.NORM_EPSILON if dense_grid is None else layers.PYRAMID_EPSILON
        super().__init__(sizes, patch_norm=epsilon, final_norm=final_norm, dtype=dtype, rngs=rngs)
        message = f"model.window must be an even number of tokens from 4 (half of it on the compact grid), not {window}"
        require(window > 2 and window % 2 == 0, message)
        self.window = window
        self.dense_grid = dense_grid
        self.stages = nnx.List(
            SwinStage(stage, position_width=position_width, merge_epsilon=epsilon, dtype=dtype, rngs=rngs)
            for stage in sizes.stages()
        )

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Raise a UserError unless windows tile a compact grid at every stage, or cover it."""
        if not compact:
            return
        sides = [size // 2**stage for size in grid for stage in range(len(self.widths))]

        def fits(window: int) -> bool:
            return all(side <= window // 2 or side % (window // 2) == 0 for side in sides)

        nearest = sorted(filter(fits, range(4, 2 * max(grid) + 1, 2)), key=lambda window: abs(window - self.window))
        message = (
            f"model.window: windows of {self.window // 2} tokens (half of model.window on the compact grid) do not "
            f"tile stages of {grid[0]} x {grid[1]} tokens, halved from stage to stage"
        )
        require(fits(self.window), f"{message}; choose {' or '.join(map(str, sorted(nearest[:2])))}")

    def _windows(self, grid: tuple[int, int], stage: int, mask: Mask | None) -> list[Windows]:
        """Return the windows of even and of odd blocks of a stage, counted from 0."""
        if self.dense_grid is not None and mask is None:
            side = max(self.dense_grid) // 2**stage
            window = min(self.window, side)
            return [make_dense_windows(grid, window, shifted=shifted and side > window) for shifted in (False, True)]
        window, offset = (self.window, None) if mask is None else (self.window // 2, require_uniform(mask).offset)
        return [make_windows(grid, window, shifted=shifted, offset=offset) for shifted in (False, True)]

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """See `Encoder.__call__`."""
        self.check_grid((tokens.shape[1], tokens.shape[2]), compact=mask is not None)
        maps, (rows, columns) = [], tokens.shape[1:3]
        for number, stage in enumerate(self.stages):
            windows = self._windows((rows // 2**number, columns // 2**number), number, mask)
            with jax.named_scope(f"stage_{number + 1}"):
                tokens = self.apply_stage(stage, tokens, windows, drop_keys)
            maps.append(tokens)
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        return Features(tuple(maps))
