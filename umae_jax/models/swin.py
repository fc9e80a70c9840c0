"""The Swin encoder of UM-MAE (SPEC 3): one class for compact grids and whole images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import UserError, require
from umae_jax.masking import Mask
from umae_jax.models import layers
from umae_jax.models.attention import Bias, attend, merge_heads, split_channels, split_heads
from umae_jax.models.encoder import Encoder, Features, Sizes, uniform
from umae_jax.models.kernels import pallas_tpu
from umae_jax.models.layers import DropPath
from umae_jax.models.windows import Windows, make_windows
from umae_jax.patches import patchify
from umae_jax.positions import select_case


class PositionBias(nnx.Module):
    """A small MLP from a pair's coordinate difference to one bias a head, in float32."""

    def __init__(self, heads: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        def small(inputs: int, outputs: int) -> nnx.Linear:
            kernel_init = layers.convolution_init(1, outputs)
            return layers.linear(inputs, outputs, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)

        self.fc1 = small(2, hidden)
        self.fc2 = small(hidden, heads)

    def tables(self, windows: Windows) -> jax.Array:
        """The bias of each case of each pair of places, [9 or 1, 1 or windows, heads, N keys, N queries].

        The MLP runs over these, never over the pairs of every window of every image.
        """
        return self.fc2(jax.nn.relu(self.fc1(jnp.asarray(windows.differences)))).transpose(0, 1, 4, 2, 3)

    def __call__(self, windows: Windows) -> Bias:
        """The bias of every pair of every window, [B or 1, windows or 1, heads, N keys, N queries].

        Queries of windows that are attended to together lie side by side; see `Windows.side_by_side`.
        """

        def of_pairs(tables: jax.Array) -> jax.Array:
            bias = windows.lay_side_by_side(tables, 1)
            if windows.steps is not None:
                row_step, column_step = (windows.lay_side_by_side(step, 1) for step in windows.steps)
                bias = select_case(bias, row_step, column_step)
            if windows.mask is not None:
                bias = bias + windows.lay_side_by_side(jnp.asarray(windows.mask), 0)[None, :, None]
            return bias

        return Bias(self.tables(windows), of_pairs)


class SwinBlock(layers.Block):
    """x + W-MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: int,
        *,
        drop: DropPath,
        position_width: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads = heads
        self.drop = drop
        self.norm1 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.position = PositionBias(heads, position_width, rngs=rngs)
        self.qkv = layers.linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs)
        self.mlp = layers.Mlp(width, mlp_ratio * width, dtype=dtype, rngs=rngs)

    def forward(self, x: jax.Array, windows: Windows, drop_keys: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        with jax.named_scope("attention"):
            normed = self.norm1(x).astype(self.qkv.dtype)
            if self.fused_attention and pallas_tpu.takes_windows(x.shape, windows, self.heads):
                maps, biases = split_channels(self.qkv, normed, 3)  # [B, H, W, C]
                tables = self.position.tables(windows)[:, 0]
                attended = self.proj(pallas_tpu.attend_in_windows(maps, biases, windows, tables))
            else:
                several = windows.side_by_side
                q, k, v = split_heads(self.qkv, windows.cut(normed), 3, self.heads, side_by_side=several)
                attended = attend(q, k, v, self.position(windows), several)  # [B, windows, heads, d, N]
                attended = merge_heads(self.proj, attended)
                attended = windows.join(attended, x.shape[1:3])
            x = x + self.drop(attended, drop_keys, 0)
        with jax.named_scope("mlp"):
            return x + self.drop(self.mlp(self.norm2(x)), drop_keys, 1)


class Merge(nnx.Module):
    """Layer norm and a 2 x 2 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = layers.layer_norm(inputs, rngs=rngs)
        kernel_init = layers.convolution_init(4, outputs)
        self.proj = layers.linear(4 * inputs, outputs, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / 2, W / 2, C']."""
        with jax.named_scope("merge"):
            return self.proj(patchify(self.norm(x), 2))


class SwinStage(nnx.Module):
    """Blocks of one width at one resolution, behind a merge unless it is the first; odd blocks shift their windows."""

    def __init__(
        self,
        inputs: int | None,
        width: int,
        heads: int,
        mlp_ratio: int,
        drops: Sequence[DropPath],
        *,
        position_width: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.merge = None if inputs is None else Merge(inputs, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            SwinBlock(width, heads, mlp_ratio, drop=drop, position_width=position_width, dtype=dtype, rngs=rngs)
            for drop in drops
        )

    def __call__(self, x: jax.Array, window: int, offset: jax.Array | None, drop_keys: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', C'], half the size behind a merge."""
        if self.merge is not None:
            x = self.merge(x)
        grid = (x.shape[1], x.shape[2])
        straight, shifted = (make_windows(grid, window, shifted=turn, offset=offset) for turn in (False, True))
        for number, block in enumerate(self.blocks):
            x = block(x, shifted if number % 2 else straight, drop_keys)
        return x


class Swin(Encoder):
    """Swin with convolutional merges and a position MLP over original coordinates.

    Args:
        window: side of a window in tokens on a whole image; half that on the compact grid. A whole image that windows
            do not tile is padded.
        position_width: hidden width of the position MLP.
        And those of `Encoder`.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        window: int,
        position_width: int,
        final_norm: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(sizes, patch_norm=True, final_norm=final_norm, dtype=dtype, rngs=rngs)
        require(
            window > 2 and window % 2 == 0,
            f"model.window must be an even number of tokens from 4 (half of it on the compact grid), not {window}",
        )
        self.window = window
        self.stages = nnx.List(
            SwinStage(*stage, position_width=position_width, dtype=dtype, rngs=rngs) for stage in sizes.stages()
        )

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Check that windows tile a compact grid at every stage, or cover it; see `Encoder.check_grid`."""
        if not compact:
            return
        sides = [size // 2**stage for size in grid for stage in range(len(self.widths))]

        def fits(window: int) -> bool:
            return all(side <= window // 2 or side % (window // 2) == 0 for side in sides)

        if not fits(self.window):
            fitting = sorted(filter(fits, range(4, 2 * max(grid) + 1, 2)), key=lambda window: abs(window - self.window))
            raise UserError(
                f"model.window: windows of {self.window // 2} tokens (half of model.window on the compact grid) do not "
                f"tile stages of {' x '.join(map(str, grid))} tokens, halved from stage to stage; choose "
                + " or ".join(map(str, sorted(fitting[:2])))
            )

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """See `Encoder.__call__`.

        Raises:
            TypeError: for a mask other than a uniform one.
        """
        mask = uniform(mask)
        self.check_grid((tokens.shape[1], tokens.shape[2]), compact=mask is not None)
        window, offset = (self.window, None) if mask is None else (self.window // 2, mask.offset)
        maps = []
        for number, stage in enumerate(self.stages, 1):
            with jax.named_scope(f"stage_{number}"):
                tokens = stage(tokens, window, offset, drop_keys)
            maps.append(tokens)
        if self.norm is not None:
            maps[-1] = self.norm(maps[-1])
        return Features(tuple(maps))
