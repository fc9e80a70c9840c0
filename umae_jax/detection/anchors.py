"""Anchors of a region proposal network (DET 1.4)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def grid_anchors(
    grid: tuple[int, int], stride: int, scale: float = 8, ratios: Sequence[float] = (0.5, 1, 2)
) -> np.ndarray:
    """Return the anchors of one level, centered on the upper left corners of its cells.

    Args:
        grid: rows and columns of cells.
        stride: side of a cell in pixels.
        scale: side of a square anchor over `stride`.
        ratios: height over width of each anchor of a cell; all have the same area.

    Returns:
        float32 [rows * columns * len(ratios), 4], ordered by row, column and ratio.
    """
    root = np.sqrt(np.asarray(ratios, np.float64))
    half = scale * stride / 2 * np.stack([1 / root, root], axis=-1)  # of width and height
    y, x = np.meshgrid(stride * np.arange(grid[0]), stride * np.arange(grid[1]), indexing="ij")
    center = np.stack([x, y], axis=-1)[:, :, None]
    return np.concatenate([center - half, center + half], axis=-1).reshape(-1, 4).astype(np.float32)


def inside(anchors: jax.Array, image_size: jax.Array) -> jax.Array:
    """Return whether each anchor lies in the image: [..., 4] and (height, width), [2] -> bool [...]."""
    height, width = (image_size[axis].astype(anchors.dtype) for axis in (0, 1))
    x1, y1, x2, y2 = (anchors[..., k] for k in range(4))
    return (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)


def cells_inside(grid: tuple[int, int], stride: int, size: jax.Array) -> jax.Array:
    """Return whether each cell of a level begins inside an image.

    Args:
        grid: rows and columns of cells.
        stride: side of a cell in pixels.
        size: (height, width) of the image, padded by itself but not to the batch, [2].

    Returns:
        bool [rows * columns], in row-major order.
    """
    rows, columns = (stride * jnp.arange(grid[axis], dtype=size.dtype) < size[axis] for axis in (0, 1))
    return (rows[:, None] & columns[None]).reshape(-1)
