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
    """

    def __init__(self, width: int, grid: tuple[int, int], *, class_token: bool = False, learned: bool = False) -> None:
        self.width = width
        self.grid = grid
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
        table = resize_positions(self._values()[:, self.leading :], self.grid, (rows, columns))
        table = table.reshape(1, rows, columns, self.width)
        return (table if mask is None else mask.compact(table)).astype(tokens.dtype)
