"""The Swin encoder of UM-MAE (SPEC 3): one class for compact grids and whole images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import UserError, require
from umae_jax.masking import expand
from umae_jax.models import layers
from umae_jax.models.windows import Windows, make_windows
from umae_jax.patches import patchify
from umae_jax.positions import select_case

MLP_RATIO = 4  # hidden width of a block's MLP over its width


class PositionBias(nnx.Module):
    """A small MLP from a pair's coordinate difference to one bias a head, in float32."""

    def __init__(self, heads: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        def small(inputs: int, outputs: int) -> nnx.Linear:
            kernel_init = layers.convolution_init(1, outputs)
            return layers.linear(inputs, outputs, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)

        self.fc1 = small(2, hidden)
        self.fc2 = small(hidden, heads)

    def __call__(self, windows: Windows) -> jax.Array:
        """The bias of every pair of every window, [B or 1, windows or 1, heads, N, N].

        The MLP runs once over each case of each pair of places, never over the pairs of every window of every image.
        """
        tables = self.fc2(jax.nn.relu(self.fc1(jnp.asarray(windows.differences))))
        tables = tables.transpose(0, 1, 4, 2, 3)  # [cases, 1 or windows, heads, N, N]
        if windows.row_step is None or windows.column_step is None:
            bias = tables
        else:
            bias = select_case(tables, windows.row_step, windows.column_step)
        if windows.mask is not None:
            bias = bias + jnp.asarray(windows.mask)[None, :, None]
        return bias


class SwinBlock(nnx.Module):
    """x + W-MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, *, position_width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1 = layers.layer_norm(width, rngs=rngs)
        self.position = PositionBias(heads, position_width, rngs=rngs)
        self.qkv = layers.linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layers.layer_norm(width, rngs=rngs)
        self.mlp = layers.Mlp(width, MLP_RATIO * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, windows: Windows) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        qkv = self.qkv(windows.cut(self.norm1(x)))  # [B, windows, N, 3 C]
        attended = self.proj(layers.attend(*layers.split_heads(qkv, self.heads), self.position(windows)))
        x = x + windows.join(attended, x.shape[1:3])
        return x + self.mlp(self.norm2(x))


class Merge(nnx.Module):
    """Layer norm and a 2 x 2 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = layers.layer_norm(inputs, rngs=rngs)
        kernel_init = layers.convolution_init(4, outputs)
        self.proj = layers.linear(4 * inputs, outputs, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / 2, W / 2, C']."""
        return self.proj(patchify(self.norm(x), 2))


class SwinStage(nnx.Module):
    """Blocks of one width at one resolution, behind a merge unless it is the first; odd blocks shift their windows."""

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        heads: int,
        *,
        position_width: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.merge = Merge(inputs, width, dtype=dtype, rngs=rngs) if inputs != width else None
        self.blocks = nnx.List(
            SwinBlock(width, heads, position_width=position_width, dtype=dtype, rngs=rngs) for _ in range(depth)
        )

    def __call__(self, x: jax.Array, window: int, offset: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', C'], half the size behind a merge."""
        if self.merge is not None:
            x = self.merge(x)
        grid = (x.shape[1], x.shape[2])
        straight, shifted = (make_windows(grid, window, shifted=turn, offset=offset) for turn in (False, True))
        for number, block in enumerate(self.blocks):
            x = block(x, shifted if number % 2 else straight)
        return x


class Swin(nnx.Module):
    """Swin with convolutional merges and a position MLP over original coordinates.

    The same object encodes the compact grid of a uniform mask (`offset` given) and whole images (without).
    Stage i has width `width * 2**i` and halves the resolution of the stage before it.

    Args:
        channels: channels of the image.
        patch: side of a patch in pixels.
        width: width of the first stage.
        depths, heads: blocks and attention heads of each stage.
        window: side of a window in tokens.
        position_width: hidden width of the position MLP.
        dtype: what the linear layers compute in.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        *,
        channels: int,
        patch: int,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        position_width: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        require(
            len(depths) == len(heads) > 0,
            f"model.depths names {len(depths)} stages and model.heads {len(heads)}; write one number a stage in each",
        )
        self.patch = patch
        self.window = window
        self.widths = tuple(width * 2**stage for stage in range(len(depths)))
        for stage, (stage_width, stage_heads) in enumerate(zip(self.widths, heads, strict=True)):
            require(
                stage_heads > 0 and stage_width % stage_heads == 0,
                f"model.heads: {stage_heads} heads do not divide the width {stage_width} of stage {stage + 1}; "
                f"choose a divisor of {stage_width}",
            )
        require(min(depths) > 0, f"model.depths: every stage needs at least one block, not {tuple(depths)}")
        require(window > 1, f"model.window must be at least 2 tokens, not {window}")
        self.patch_embed = layers.linear(patch * patch * channels, width, dtype=dtype, rngs=rngs)
        self.patch_norm = layers.layer_norm(width, rngs=rngs)
        self.stages = nnx.List(
            SwinStage(
                inputs,
                stage_width,
                depth,
                stage_heads,
                position_width=position_width,
                dtype=dtype,
                rngs=rngs,
            )
            for inputs, stage_width, depth, stage_heads in zip(
                (width, *self.widths), self.widths, depths, heads, strict=False
            )
        )
        self.norm = layers.layer_norm(self.widths[-1], rngs=rngs)
        self.dtype = dtype

    @property
    def stride(self) -> int:
        """Pixels on the side of one output token."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Check that windows tile a grid of patches [rows, columns] at every stage, or cover it.

        Raises:
            UserError: naming the windows that do.
        """
        sides = [size // 2**stage for size in grid for stage in range(len(self.widths))]

        def fits(window: int) -> bool:
            return all(side <= window or side % window == 0 for side in sides)

        if not fits(self.window):
            fitting = sorted(filter(fits, range(2, max(grid) + 1)), key=lambda window: abs(window - self.window))
            raise UserError(
                f"model.window: windows of {self.window} tokens do not tile stages of "
                f"{' x '.join(map(str, grid))} tokens, halved from stage to stage; choose "
                + " or ".join(map(str, sorted(fitting[:2])))
            )

    def embed(
        self, pixels: jax.Array, hidden: jax.Array | None = None, mask_token: jax.Array | None = None
    ) -> jax.Array:
        """Pixels [B, H, W, channels] to tokens [B, H / patch, W / patch, width].

        Args:
            pixels: a whole image or the compact map of its sampled units.
            hidden: bool [B, cell rows, cell columns], the units whose content the encoder must not see.
            mask_token: [1, 1, width], takes the place of their tokens and goes through the same layer norm as they do.
        """
        x = self.patch_embed(patchify(pixels, self.patch))
        if hidden is not None and mask_token is not None:
            hidden = expand(hidden, x.shape[1] // hidden.shape[1])[..., None]
            x = jnp.where(hidden, mask_token.astype(x.dtype)[None], x)
        return self.patch_norm(x).astype(self.dtype)

    def __call__(self, tokens: jax.Array, offset: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Tokens from `embed` to the feature map of every stage, the last one normed (float32).

        Args:
            tokens: [B, rows, columns, width].
            offset: the offsets of the uniform mask that made the grid compact; None on a whole image.

        Returns:
            One map [B, rows / 2**i, columns / 2**i, width * 2**i] for each stage i.
        """
        self.check_grid((tokens.shape[1], tokens.shape[2]))
        maps = []
        for stage in self.stages:
            tokens = stage(tokens, self.window, offset)
            maps.append(tokens)
        maps[-1] = self.norm(maps[-1])
        return tuple(maps)
