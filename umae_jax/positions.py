"""Where a token is: fixed sin-cos tables, and the coordinate differences behind the relative position bias."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.models.kernels.platforms import is_for


def sincos_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """The fixed 2-D sin-cos embedding (SPEC 6): float32 [rows, columns, width]; `width` is a multiple of 4.

    The first half of the channels encodes the column, [sin, cos]; the second half the row.
    """
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))

    def encode(places: int) -> np.ndarray:
        angles = np.arange(places)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows, columns = grid
    by_column = np.broadcast_to(encode(columns)[None, :], (rows, columns, width // 2))
    by_row = np.broadcast_to(encode(rows)[:, None], (rows, columns, width // 2))
    return np.concatenate([by_column, by_row], axis=-1).astype(np.float32)


def _along_axis(size: int, starts: np.ndarray, unit_side: float | None, steps: np.ndarray) -> np.ndarray:
    """Differences of one coordinate inside windows, key minus query: float64 [1 or starts, steps, size, size].

    On the compact grid (`unit_side` given) every unit stands for a cell of twice its extent, and `steps` are the
    possible differences of two units' offsets. One row serves all windows where they all cut the units alike.
    """
    place = starts[:, None] + np.arange(size)
    if unit_side is not None:
        place = place + place // unit_side * unit_side
    difference = place[:, None, :, None] - place[:, None, None, :]
    if (difference == difference[:1]).all():
        difference = difference[:1]
    return difference + steps[:, None, None] * (unit_side or 0)


def window_differences(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], unit_side: float | None
) -> np.ndarray:
    """Every coordinate difference that tokens i (query) and j (key) of a window can have (SPEC 3), log-scaled.

    On a whole image that is one number an axis for each pair. On the compact grid the difference also depends on the
    offsets the two units drew, but only on *their* difference, (dy_j - dy_i, dx_j - dx_i), each in {-1, 0, 1}: nine
    cases in all.

    Args:
        grid: rows and columns of tokens.
        window: rows and columns of tokens in a window; they divide the grid's.
        shift: row and column at which the first window starts.
        unit_side: tokens on a mask unit's side at this stage (1/2 where a token spans 2 units); None on a whole image.

    Returns:
        float32 [cases, 1 or windows, N keys, N queries, 2], N = rows * columns of a window: sign(d) * log(1 + |d|) for
        row and column. Case 3 * (row step + 1) + (column step + 1) of 9, or the only one on a whole image. The windows
        share their differences unless they cut the units at different places.
    """
    steps = np.zeros(1) if unit_side is None else np.array([-1, 0, 1])
    rows, columns = (
        _along_axis(window[axis], np.arange(shift[axis], grid[axis] + shift[axis], window[axis]), unit_side, steps)
        for axis in (0, 1)
    )
    # -> [row steps, column steps, window rows, window columns, key row, key column, query row, query column]
    rows = rows.transpose(1, 0, 2, 3)[:, None, :, None, :, None, :, None]
    columns = columns.transpose(1, 0, 2, 3)[None, :, None, :, None, :, None, :]
    difference = np.stack(np.broadcast_arrays(rows, columns), axis=-1)
    tokens = window[0] * window[1]
    difference = difference.reshape(len(steps) ** 2, -1, tokens, tokens, 2)
    return (np.sign(difference) * np.log1p(np.abs(difference))).astype(np.float32)


def choose(step: jax.Array, cases: Sequence[jax.Array]) -> jax.Array:
    """One of three by the sign of a step, that of -1, 0 or 1, by selects; all broadcast."""
    return jnp.where(step < 0, cases[0], jnp.where(step > 0, cases[2], cases[1]))


def select_case(tables: jax.Array, row_step: jax.Array, column_step: jax.Array) -> jax.Array:
    """Choose each pair's value among the nine cases, by nested selects: a gather would move far more memory.

    Args:
        tables: [9, 1 or windows, heads, N, N], keys before queries, in the order of `window_differences`.
        row_step, column_step: integers in {-1, 0, 1}, [B, windows, N, N].

    Returns:
        [B, windows, heads, N, N].
    """
    return (_select_case_on_cpus if is_for("cpu") else _select_case)(tables, row_step, column_step)


def _select_case(tables: jax.Array, row_step: jax.Array, column_step: jax.Array) -> jax.Array:
    tables = tables[:, None]  # [9, 1, 1 or windows, heads, N, N]
    row_step, column_step = row_step[:, :, None], column_step[:, :, None]
    return choose(row_step, [choose(column_step, list(tables[3 * row : 3 * row + 3])) for row in range(3)])


# XLA:CPU goes through the gradient once for each case, at many times the cost of one sum for all.
# Devices that share a batch exchange their sums.
_select_case_on_cpus = jax.custom_vjp(_select_case)


def _forward(tables: jax.Array, row_step: jax.Array, column_step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _select_case(tables, row_step, column_step), (tables, row_step, column_step)


def _backward(residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    tables, row_step, column_step = residuals
    case = (3 * row_step + column_step + 4)[:, :, None]  # [B, windows, 1, N, N]
    zero = np.zeros((), gradient.dtype)
    of_cases = [jnp.where(case == number, gradient, zero) for number in range(9)]
    shared = (0, 1) if tables.shape[1] == 1 else (0,)
    sums = jax.lax.reduce(of_cases, [zero] * 9, lambda one, other: jax.tree.map(jnp.add, one, other), shared)
    return jnp.stack(sums).reshape(tables.shape), None, None


_select_case_on_cpus.defvjp(_forward, _backward)
