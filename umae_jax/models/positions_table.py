"""The absolute position embedding of PVT and ViT (SPEC 4, 5)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umae_jax.masking import Mask
from umae_jax.positions import sincos_table


def resize_positions(table: jax.Array, old: tuple[int, int], new: tuple[int, int], *, leading: int = 0) -> jax.Array:
    """Resize a grid's position embeddings, bicubic and antialiased.

    Args:
        table: [1, leading + places, C].
        old, new: rows and columns of the grids.
        leading: number of embeddings before those of the grid, such as the class token's; they are not resized.
    """
    if old == new:
        return table
    width = table.shape[-1]
    resized = jax.image.resize(table[:, leading:].reshape(1, *old, width), (1, *new, width), "cubic")
    return jnp.concatenate([table[:, :leading], resized.reshape(1, -1, width)], axis=1)


def interpolate_positions(table: jax.Array, new: tuple[int, int]) -> jax.Array:
    """Resize position embeddings as the reference does for dense prediction, [1, rows, columns, C] -> [1, *new, C].

    Bicubic with coefficient -0.75, pixel centres at +0.5 and repeated borders, without antialiasing.
    """
    old = table.shape[1:3]
    if old == new:
        return table
    rows, columns = (jnp.asarray(_bicubic(*sizes)) for sizes in zip(old, new, strict=True))
    return jnp.einsum("rh,bhwc,sw->brsc", rows, table, columns, precision="highest")


def _bicubic(old: int, new: int) -> np.ndarray:
    """Return the matrix that interpolates an axis, float32 [new, old]."""
    centers = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(centers) + np.arange(-1, 3)  # [new, 4]
    distance = np.abs(centers - taps)
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    matrix = np.zeros((new, old), np.float32)
    taps = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], taps), np.where(distance <= 1, near, far).astype(np.float32))
    return matrix


def fixed_positions(width: int, grid: tuple[int, int], leading: int) -> np.ndarray:
    """Return `leading` rows of zeros and the sin-cos table of a grid, float32 [1, leading + places, width]."""
    return np.pad(sincos_table(width, grid).reshape(-1, width), ((leading, 0), (0, 0)))[None]


class PositionTable(nnx.Module):
    """The position embedding of a grid of patches: the fixed sin-cos table, or a learned one that starts as it.

    Args:
        width: channels of a token.
        grid: rows and columns of the full grid; the table is resized for other grids.
        class_token: reserve position 0 for a class token.
        learned: make the table a parameter, [1, class token and patches, width].
        dense: resize the table by `interpolate_positions`, not `resize_positions`.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        class_token: bool = False,
        learned: bool = False,
        dense: bool = False,
    ) -> None:
        self.width = width
        self.grid = grid
        self.dense = dense
        self.leading = int(class_token)
        self.table = nnx.Param(jnp.asarray(fixed_positions(width, grid, self.leading))) if learned else None

    def _values(self) -> jax.Array:
        if self.table is not None:
            return self.table[...]
        return jnp.asarray(fixed_positions(self.width, self.grid, self.leading))

    def class_token_position(self) -> jax.Array:
        """Return the position embedding of the class token, [1, 1, width]."""
        return self._values()[:, : self.leading]

    def __call__(self, tokens: jax.Array, mask: Mask | None) -> jax.Array:
        """Return the positions of a map of tokens [B, rows, columns, width], compact if a mask is given: [B or 1, ...].

        On the compact grid each token keeps the embedding of its place in the full grid.
        """
        rows, columns = (size * (1 if mask is None else 2) for size in tokens.shape[1:3])
        table = self._values()[:, self.leading :]
        if self.dense:
            table = interpolate_positions(table.reshape(1, *self.grid, self.width), (rows, columns))
        else:
            table = resize_positions(table, self.grid, (rows, columns)).reshape(1, rows, columns, self.width)
        return (table if mask is None else mask.compact(table)).astype(tokens.dtype)
