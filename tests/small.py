"""Small models of every kind, with parameters that are nowhere zero or one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import golden
from umae_jax.models.build import build_model

KINDS = golden.FILES  # the configurations of the golden files, which need none of them
PRETRAINED = tuple(kind for kind in KINDS if "classifier" not in kind)
PYRAMIDS = tuple(kind for kind in KINDS if "vit" not in kind)


def random_model(config, seed=0):
    """A model whose every parameter is drawn at random, and its parameters."""
    graph, params = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))), nnx.Param)
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.2
        return jnp.asarray(spread * generator.normal(size=leaf.shape) + ("scale" in str(path)), jnp.float32)

    return graph, jax.tree_util.tree_map_with_path(draw, params)
