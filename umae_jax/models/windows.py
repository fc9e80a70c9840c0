"""Windows over a grid of tokens: where they lie, what may see what, and which position differences occur (SPEC 3)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.masking import expand
from umae_jax.models.kernels.platforms import LANES, is_for
from umae_jax.positions import window_differences

# What is added before the softmax to pairs that the cyclic shift brought together from opposite borders.
ACROSS_BORDERS = -100.0


@dataclass(frozen=True)
class Windows:
    """The windows of one block. Static but for the steps, which are traced arrays.

    Attributes:
        size: rows and columns of tokens in a window.
        shift: rows and columns by which the grid is rolled towards the origin before it is cut.
        padding: rows and columns of nothing that are put below and to the right of the grid before that, so that
            windows tile it; no token sees them.
        differences: float32 [9 or 1, 1 or windows, N keys, N queries, 2], the log-scaled coordinate differences of each
            case.
        regions: int [windows, N], what of the map a token is from; tokens of different regions of a window are no
            neighbours. None without a shift and padding.
        offsets: int8 [B, windows, 2, N], dy and dx of the unit that each token is from; None on a whole image.
        side_by_side: how many neighbouring windows are attended to at a time; see `attention.py`.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    padding: tuple[int, int]
    differences: np.ndarray
    regions: np.ndarray | None
    offsets: jax.Array | None
    side_by_side: int

    def lay_side_by_side(self, pairs: jax.Array, axis: int) -> jax.Array:
        """Put the queries of neighbouring windows side by side: [..., windows, ..., N, N] -> [..., N, several * N].

        Args:
            pairs: of keys and queries.
            axis: that of windows, which becomes so many times shorter; where there is one for all, it stays.
        """
        several = self.side_by_side
        if pairs.shape[axis] == 1:
            return jnp.concatenate([pairs] * several, axis=-1)
        pairs = pairs.reshape(*pairs.shape[:axis], -1, several, *pairs.shape[axis + 1 :])
        pairs = jnp.moveaxis(pairs, axis + 1, -2)  # [..., N keys, several, N queries]
        return pairs.reshape(*pairs.shape[:-2], -1)

    @property
    def mask(self) -> np.ndarray | None:
        """float32 [windows, N, N], ACROSS_BORDERS for pairs of different regions, else 0; None where all are alike."""
        if self.regions is None:
            return None
        alike = self.regions[:, :, None] == self.regions[:, None, :]
        return np.where(alike, 0, ACROSS_BORDERS).astype(np.float32)

    @property
    def steps(self) -> tuple[jax.Array, jax.Array] | None:
        """Differences of two units' dy and dx, int8 [B, windows, N keys, N queries]; None on a whole image.

        Key minus query.
        """
        if self.offsets is None:
            return None
        row, column = (self.offsets[:, :, axis, :, None] - self.offsets[:, :, axis, None, :] for axis in (0, 1))
        return row, column

    def cut(self, x: jax.Array) -> jax.Array:
        """Pad, roll and cut: [B, H, W, C] -> [B, windows, N, C]."""
        if any(self.padding):
            x = jnp.pad(x, ((0, 0), (0, self.padding[0]), (0, self.padding[1]), (0, 0)))
        if any(self.shift):
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        return _cut(x, self.size)

    def join(self, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """The inverse of `cut`: [B, windows, N, C], or several windows at a time, -> [B, H, W, C]."""
        rows, columns = self.size
        height, width = grid[0] + self.padding[0], grid[1] + self.padding[1]
        x = x.reshape(x.shape[0], height // rows, width // columns, rows, columns, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], height, width, -1)
        if any(self.shift):
            x = jnp.roll(x, self.shift, axis=(1, 2))
        return x[:, : grid[0], : grid[1]]


def _cut(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, windows, N, C], windows and tokens in row-major order."""
    batch, height, width, channels = x.shape
    rows, columns = size
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, rows * columns, channels)


def _region(size: int, shift: int, padding: int) -> np.ndarray:
    """Along one axis, the region of each token of the padded and rolled grid: int [size + padding]."""
    place = np.arange(size + padding)
    # The last `shift` tokens came from the other border, and padding is like nothing else.
    from_other_border = place >= size + padding - shift
    original = (place + shift) % (size + padding)
    return np.where(original >= size, 2, from_other_border)


def _regions(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int]
) -> np.ndarray | None:
    """Numbers of regions, int [windows, N]: different for tokens that shift and padding brought together."""
    if not any(shift) and not any(padding):
        return None
    rows, columns = (_region(grid[axis], shift[axis], padding[axis]) for axis in (0, 1))
    region = 3 * rows[:, None] + columns[None, :]
    blocks = region.reshape(len(rows) // size[0], size[0], len(columns) // size[1], size[1])
    return blocks.transpose(0, 2, 1, 3).reshape(-1, size[0] * size[1])


def make_windows(
    grid: tuple[int, int],
    window: int,
    *,
    shifted: bool,
    offset: jax.Array | None,
) -> Windows:
    """Lay windows of `window` x `window` tokens over a grid.

    Along an axis on which the grid is no larger than the window, the window is the grid and nothing shifts. Where
    windows do not tile a whole image's grid, it is padded.

    Args:
        grid: rows and columns of tokens; on the compact grid each a multiple of the window or no larger than it.
        window: side of a window in tokens.
        shifted: whether windows start at half their side.
        offset: the offsets drawn on the compact grid, [B, cell rows, cell columns]; None on a whole image.
    """
    size = (min(window, grid[0]), min(window, grid[1]))
    shift = (
        window // 2 if shifted and grid[0] > window else 0,
        window // 2 if shifted and grid[1] > window else 0,
    )
    padding = (-grid[0] % size[0], -grid[1] % size[1])
    regions = _regions(grid, size, shift, padding)
    tokens = size[0] * size[1]
    side_by_side = 1
    if is_for("tpu"):
        windows = (grid[0] + padding[0]) * (grid[1] + padding[1]) // tokens
        side_by_side = math.gcd(windows, max(1, LANES // tokens))
    if offset is None:
        # Every window has the same differences, so that the first one tells them all.
        return Windows(size, shift, padding, window_differences(size, size, (0, 0), None), regions, None, side_by_side)
    unit_side = grid[0] / offset.shape[1]
    if unit_side >= 1:
        offset = expand(offset, int(unit_side))
    else:  # a token that spans several units has the place of the first of them
        offset = offset[:, :: int(1 / unit_side), :: int(1 / unit_side)]
    offset = jnp.roll(offset.astype(jnp.int8), (-shift[0], -shift[1]), axis=(1, 2))
    offsets = _cut(jnp.stack([offset // 2, offset % 2], axis=-1), size).transpose(0, 1, 3, 2)
    differences = window_differences(grid, size, shift, unit_side)
    return Windows(size, shift, padding, differences, regions, offsets, side_by_side)
