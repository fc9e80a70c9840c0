"""Small models of every kind, with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import golden
from tests.rngs import ConstantRngs
from umae_jax.models.build import build_model

KINDS = golden.FILES  # the configurations of the golden files
PRETRAINED = tuple(kind for kind in KINDS if "classifier" not in kind)
PYRAMIDS = tuple(kind for kind in KINDS if "vit" not in kind)


def random_model(config, seed=0):
    """The graph and randomly drawn parameters of a configuration's model."""
    graph, params = nnx.split(nnx.eval_shape(lambda: build_model(config, ConstantRngs())), nnx.Param)
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.2
        return jnp.asarray(spread * generator.normal(size=leaf.shape) + ("scale" in str(path)), jnp.float32)

    return graph, jax.tree_util.tree_map_with_path(draw, params)


def original_coordinates(offset, side):
    """Row and column on the full grid of every token of the compact grid, by plain loops: int32 [B, rows, columns, 2].

    Args:
        offset: [B, cell rows, cell columns].
        side: tokens along a unit's side.
    """
    offset = np.asarray(offset)
    batch, rows, columns = offset.shape
    coordinates = np.empty((batch, rows * side, columns * side, 2), np.int32)
    for image, row, column in np.ndindex(coordinates.shape[:3]):
        dy, dx = divmod(int(offset[image, row // side, column // side]), 2)
        coordinates[image, row, column] = (
            (2 * (row // side) + dy) * side + row % side,
            (2 * (column // side) + dx) * side + column % side,
        )
    return coordinates
