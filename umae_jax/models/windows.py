"""Window partition, cyclic shift, attention mask and relative coordinates of Swin (SPEC 3)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.errors import require
from umae_jax.masking import expand
from umae_jax.positions import select_offset_case, window_differences

# Added, as in Swin, to the logits of pairs that the cyclic shift brought together from opposite borders.
MASK_VALUE = -100.0
MAX_MASK = 2**28  # numbers of a mask: 1 GiB


@dataclass(frozen=True)
class Windows:
    """Window layout of one block. All attributes are static, except the traced array `offsets`."""

    size: tuple[int, int]  # rows and columns of tokens in a window
    shift: tuple[int, int]  # rows and columns by which the grid is rolled towards the origin before partitioning
    padding: tuple[int, int]  # rows and columns of zeros added at the bottom and right for windows to tile the grid
    differences: np.ndarray  # float32 [9 or 1, 1 or windows, N keys, N queries, 2], see `positions.window_differences`
    # The region of the map that each token comes from, int8 [windows, N]. Tokens of different regions do not attend to
    # each other. None if there is one region only.
    regions: np.ndarray | None
    offsets: jax.Array | None  # int8 [B, windows, 2, N], (dy, dx) of each token's mask unit; None on a whole image

    @property
    def mask(self) -> jax.Array | None:
        """Return float32 [windows, N, N]: MASK_VALUE for pairs of different regions, else 0; None without regions."""
        if self.regions is None:
            return None
        regions = jnp.asarray(
            self.regions
        )  # compared on the device: a mask of large maps is no constant of the program
        return jnp.where(regions[:, :, None] == regions[:, None, :], jnp.float32(0), jnp.float32(MASK_VALUE))

    @property
    def offset_differences(self) -> tuple[jax.Array, jax.Array] | None:
        """Return key minus query of dy and of dx, int8 [B, windows, N, N] each; None on a whole image."""
        if self.offsets is None:
            return None
        row, column = (self.offsets[:, :, axis, :, None] - self.offsets[:, :, axis, None, :] for axis in (0, 1))
        return row, column

    def pair_bias(self, tables: jax.Array) -> jax.Array:
        """Select each pair's bias, and add the mask: tables -> [B or 1, windows or 1, heads, N keys, N queries]."""
        bias = tables if self.offset_differences is None else select_offset_case(tables, *self.offset_differences)
        return bias if self.mask is None else bias + self.mask[None, :, None]

    def partition(self, x: jax.Array) -> jax.Array:
        """Pad, roll and partition into windows: [B, H, W, C] -> [B, windows, N, C]."""
        if any(self.padding):
            x = jnp.pad(x, ((0, 0), (0, self.padding[0]), (0, self.padding[1]), (0, 0)))
        if any(self.shift):
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        return _partition(x, self.size)

    def reverse(self, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """Invert `partition`: [B, windows, N, C] -> [B, H, W, C]."""
        rows, columns = self.size
        height, width = grid[0] + self.padding[0], grid[1] + self.padding[1]
        x = x.reshape(x.shape[0], height // rows, width // columns, rows, columns, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)
        if any(self.shift):
            x = jnp.roll(x, self.shift, axis=(1, 2))
        return x[:, : grid[0], : grid[1]]


def _partition(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Partition [B, H, W, C] into [B, windows, N, C], windows and tokens in row-major order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size[0], size[0], width // size[1], size[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size[0] * size[1], channels)


def _axis_regions(size: int, shift: int, padding: int) -> np.ndarray:
    """Return the region of each token on the padded, rolled axis, int [size + padding]: 1 if wrapped, 2 if padding."""
    position = np.arange(size + padding)
    wrapped = position >= size + padding - shift
    return np.where((position + shift) % (size + padding) >= size, 2, wrapped)


def _regions(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int]
) -> np.ndarray:
    """Return `Windows.regions` of shifted or padded windows."""
    (rows, columns), (by_row, by_column) = size, (_axis_regions(grid[i], shift[i], padding[i]) for i in (0, 1))
    message = f"image_size: a mask for {grid[0]} x {grid[1]} tokens in windows of {rows} x {columns} is too large"
    fits = len(by_row) * len(by_column) * rows * columns <= MAX_MASK
    require(fits, f"{message}; choose smaller images or a smaller model.window")
    region = (3 * by_row[:, None] + by_column[None, :]).astype(np.int8)
    region = region.reshape(len(by_row) // rows, rows, len(by_column) // columns, columns)
    return region.transpose(0, 2, 1, 3).reshape(-1, rows * columns)


def make_dense_windows(grid: tuple[int, int], window: int, *, shifted: bool) -> Windows:
    """Build the windows of `window` x `window` tokens for a map of any size in dense prediction (DET 1.2).

    The map is padded until windows tile it, and padded tokens take part in attention like all others. Windows are
    shifted along both axes by half their side, also along an axis of one window.
    """
    size = (window, window)
    padding = (-grid[0] % window, -grid[1] % window)
    padded = (grid[0] + padding[0], grid[1] + padding[1])
    shift = 2 * (window // 2 if shifted else 0,)
    regions = _regions(padded, size, shift, (0, 0)) if shifted else None
    return Windows(size, shift, padding, window_differences(size, size, (0, 0), None), regions, None)


def make_windows(grid: tuple[int, int], window: int, *, shifted: bool, offset: jax.Array | None) -> Windows:
    """Build the windows of `window` x `window` tokens for a grid.

    If the grid is no larger than `window` along an axis, one unshifted window spans that axis. The grid of a whole
    image is padded if windows do not tile it; no token attends to the padding.

    Args:
        grid: rows and columns of tokens; on the compact grid, each is a multiple of `window` or at most `window`.
        window: side of a window in tokens.
        shifted: shift the windows by half their side.
        offset: `UniformMask.offset`, [B, cell rows, cell columns]; None on a whole image.
    """
    rows, columns = size = (min(window, grid[0]), min(window, grid[1]))
    half = window // 2 if shifted else 0
    shift = (half if grid[0] > window else 0, half if grid[1] > window else 0)
    padding = (-grid[0] % rows, -grid[1] % columns)
    regions = _regions(grid, size, shift, padding) if any(shift) or any(padding) else None
    if offset is None:  # all windows have the same differences
        return Windows(size, shift, padding, window_differences(size, size, (0, 0), None), regions, None)
    unit_side = grid[0] / offset.shape[1]
    if unit_side >= 1:
        offset = expand(offset, int(unit_side))
    else:  # a token that spans several units has the coordinates of the first
        offset = offset[:, :: int(1 / unit_side), :: int(1 / unit_side)]
    offset = jnp.roll(offset.astype(jnp.int8), (-shift[0], -shift[1]), axis=(1, 2))
    offsets = _partition(jnp.stack([offset // 2, offset % 2], axis=-1), size).transpose(0, 1, 3, 2)
    return Windows(size, shift, padding, window_differences(grid, size, shift, unit_side), regions, offsets)
