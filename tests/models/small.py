"""Small models: those of the golden files, freshly initialised, with some keys of their configuration changed."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests import golden
from umae_jax.models.build import build_model
from umae_jax.models.layers import NO_DROP
from umae_jax.models.sizes import Stage


def config_of(name, **changes):
    """Return a golden file's configuration with fewer blocks and the decoder's positions in the right order."""
    config = golden.config_of(name)
    fewer = {"swin": {"depths": (2, 1, 1, 1)}, "pvt": {"depths": (1, 1, 1, 1)}, "vit": {}}[config.model.encoder]
    order = {"reference_order": False} if "reference_order" in config.model else {}
    for key, value in {**order, **fewer, **changes}.items():
        setattr(config if key in config else config.model, key, value)
    return config


@functools.cache
def build(name, **changes):
    config = config_of(name, **changes)
    return build_model(config, nnx.Rngs(0))


def make_stage(width, heads, mlp_ratio):
    return Stage(None, width, heads, mlp_ratio, [NO_DROP])


def random_images(model, batch=2, seed=0):
    height, width = (2 * cells * model.unit for cells in model.cells)
    return jax.random.normal(jax.random.key(seed), (batch, height, width, model.encoder.channels))


def random_case(model, batch=2, seed=0):
    mask = model.sample_mask(jax.random.split(jax.random.key(seed + 1), batch))
    return random_images(model, batch, seed), mask


@jax.jit
def encode(model, images, mask):
    return model.encode(images, mask)


@jax.jit
def run(model, images, mask):
    return model(images, mask)


@jax.jit
def pixel_gradient(model, images, mask):
    """The gradient of a random projection of the encoder's output: exactly 0 for pixels that do not reach it."""

    def project(images):
        leaves = jax.tree.leaves(model.encode(images, mask))
        keys = jax.random.split(jax.random.key(9), len(leaves))
        return sum(jnp.sum(jax.random.normal(key, leaf.shape) * leaf) for key, leaf in zip(keys, leaves, strict=True))

    return jax.grad(project)(images)
