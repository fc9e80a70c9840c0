"""Windows over a grid of tokens: where they lie, what may see what, and which position differences occur (SPEC 3)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.masking import expand
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
        mask: float32 [windows, N, N], 0 or ACROSS_BORDERS; None without a shift and padding.
        row_step, column_step: int8 [B, windows, N keys, N queries], the difference of the two units' dy and dx, key
            minus query; None on a whole image.
    """

    size: tuple[int, int]
    shift: tuple[int, int]
    padding: tuple[int, int]
    differences: np.ndarray
    mask: np.ndarray | None
    row_step: jax.Array | None
    column_step: jax.Array | None

    def cut(self, x: jax.Array) -> jax.Array:
        """Pad, roll and cut: [B, H, W, C] -> [B, windows, N, C]."""
        if any(self.padding):
            x = jnp.pad(x, ((0, 0), (0, self.padding[0]), (0, self.padding[1]), (0, 0)))
        if any(self.shift):
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        return _cut(x, self.size)

    def join(self, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """The inverse of `cut`: [B, windows, N, C] -> [B, H, W, C]."""
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


def _border_mask(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int]
) -> np.ndarray | None:
    """float32 [windows, N, N]: ACROSS_BORDERS for pairs that shift and padding brought together."""
    if not any(shift) and not any(padding):
        return None
    rows, columns = (_region(grid[axis], shift[axis], padding[axis]) for axis in (0, 1))
    region = 3 * rows[:, None] + columns[None, :]
    blocks = region.reshape(len(rows) // size[0], size[0], len(columns) // size[1], size[1])
    window = blocks.transpose(0, 2, 1, 3).reshape(-1, size[0] * size[1])  # [windows, N]
    return np.where(window[:, :, None] == window[:, None, :], 0, ACROSS_BORDERS).astype(np.float32)


def _pair_steps(component: jax.Array, size: tuple[int, int], shift: tuple[int, int]) -> jax.Array:
    """Each token's dy (or dx), [B, H, W], to its differences from others: [B, windows, N keys, N queries]."""
    component = jnp.roll(component, (-shift[0], -shift[1]), axis=(1, 2))
    component = _cut(component[..., None], size)[..., 0]  # [B, windows, N]
    return component[:, :, :, None] - component[:, :, None, :]


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
    mask = _border_mask(grid, size, shift, padding)
    if offset is None:
        # Every window has the same differences, so that the first one tells them all.
        return Windows(size, shift, padding, window_differences(size, size, (0, 0), None), mask, None, None)
    unit_side = grid[0] / offset.shape[1]
    if unit_side >= 1:
        offset = expand(offset, int(unit_side))
    else:  # a token that spans several units has the place of the first of them
        offset = offset[:, :: int(1 / unit_side), :: int(1 / unit_side)]
    offset = offset.astype(jnp.int8)
    row_step = _pair_steps(offset // 2, size, shift)
    column_step = _pair_steps(offset % 2, size, shift)
    differences = window_differences(grid, size, shift, unit_side)
    return Windows(size, shift, padding, differences, mask, row_step, column_step)
