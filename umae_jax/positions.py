"""Positions of tokens: fixed sin-cos tables, and the coordinate differences of the relative position bias."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.errors import require

MAX_NUMBERS = 2**26  # of a table: 256 MiB in float32


def sincos_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Return the fixed 2-D sin-cos embedding (SPEC 6), float32 [rows, columns, width]; `width` is a multiple of 4.

    The first half of the channels encodes the column as [sin, cos], the second half the row.
    """
    message = f"image_size: a position table of {grid[0]} x {grid[1]} tokens of {width} channels is too large"
    require(grid[0] * grid[1] * width <= MAX_NUMBERS, f"{message}; choose smaller images or a larger model.patch")
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(places: int) -> np.ndarray:
        angles = np.arange(places)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows, columns = grid
    by_column = np.broadcast_to(encode(columns)[None, :], (rows, columns, width // 2))
    by_row = np.broadcast_to(encode(rows)[:, None], (rows, columns, width // 2))
    return np.concatenate([by_column, by_row], axis=-1).astype(np.float32)


def _axis_differences(size: int, starts: np.ndarray, unit_side: float | None, steps: np.ndarray) -> np.ndarray:
    """Return coordinate differences along one axis, key minus query: float64 [1 or starts, steps, size, size].

    `steps` are the possible differences of the offsets of two units.
    """
    place = starts[:, None] + np.arange(size)
    if unit_side is not None:  # on the compact grid a unit stands for a cell, which has twice its extent
        place = place + place // unit_side * unit_side
    difference = place[:, None, :, None] - place[:, None, None, :]
    if (difference == difference[:1]).all():  # all windows cut the units at the same places
        difference = difference[:1]
    return difference + steps[:, None, None] * (unit_side or 0)


def window_differences(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], unit_side: float | None
) -> np.ndarray:
    """Return the log-scaled coordinate differences of all pairs of tokens in a window, for every case (SPEC 3).

    On the compact grid the difference of tokens i (query) and j (key) depends on their places and on the difference of
    their units' offsets, (dy_j - dy_i, dx_j - dx_i), each in {-1, 0, 1}: nine cases. A whole image has one case.

    Args:
        grid: rows and columns of tokens.
        window: rows and columns of tokens in a window; they divide the grid's.
        shift: row and column at which the first window starts.
        unit_side: tokens along a mask unit's side at this stage (1/2: a token spans 2 units); None on a whole image.

    Returns:
        float32 [9 or 1 cases, 1 or windows, N keys, N queries, 2]: sign(d) * log(1 + |d|) for row and column. The case
        is 3 * (dy_j - dy_i + 1) + (dx_j - dx_i + 1). Windows that cut the units at the same places share one entry.
    """
    steps = np.zeros(1) if unit_side is None else np.array([-1, 0, 1])
    starts = [np.arange(shift[axis], grid[axis] + shift[axis], window[axis]) for axis in (0, 1)]
    rows, columns = (_axis_differences(window[axis], starts[axis], unit_side, steps) for axis in (0, 1))
    tokens = window[0] * window[1]
    message = f"model.window: windows of {window[0]} x {window[1]} tokens are too large"
    numbers = 2 * len(steps) ** 2 * len(rows) * len(columns) * tokens**2
    require(numbers <= MAX_NUMBERS, f"{message} for the table of all pairs of tokens; choose a smaller number")
    # -> [row steps, column steps, window rows, window columns, key row, key column, query row, query column]
    rows = rows.transpose(1, 0, 2, 3)[:, None, :, None, :, None, :, None]
    columns = columns.transpose(1, 0, 2, 3)[None, :, None, :, None, :, None, :]
    difference = np.stack(np.broadcast_arrays(rows, columns), axis=-1)
    difference = difference.reshape(len(steps) ** 2, -1, tokens, tokens, 2)
    return (np.sign(difference) * np.log1p(np.abs(difference))).astype(np.float32)


def select_by_sign(step: jax.Array, cases: Sequence[jax.Array]) -> jax.Array:
    """Select one of three arrays by the sign of `step` (-1, 0 or 1); all broadcast."""
    return jnp.where(step < 0, cases[0], jnp.where(step > 0, cases[2], cases[1]))


def select_offset_case(tables: jax.Array, row_step: jax.Array, column_step: jax.Array) -> jax.Array:
    """Select the value of each pair among the nine cases, by nested selects: a gather would move far more memory.

    Args:
        tables: [9, 1 or windows, heads, N, N], keys before queries, cases in the order of `window_differences`.
        row_step, column_step: integers in {-1, 0, 1}, [B, windows, N, N].

    Returns:
        [B, windows, heads, N, N].
    """
    tables = tables[:, None]  # [9, 1, 1 or windows, heads, N, N]
    row_step, column_step = row_step[:, :, None], column_step[:, :, None]
    rows = [select_by_sign(column_step, list(tables[3 * row : 3 * row + 3])) for row in range(3)]
    return select_by_sign(row_step, rows)
