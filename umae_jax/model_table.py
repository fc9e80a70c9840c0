"""List the preset models: parameters, encoder tokens, and FLOPs per image at the paper's image size.

    python -m umae_jax.models [SIZE ...]

FLOPs are XLA's count for the compiled forward pass of one image in float32, including masking, loss and head.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax import cli, console
from umae_jax.api import list_models
from umae_jax.config import METHODS, default_config
from umae_jax.errors import require
from umae_jax.models.build import build_model
from umae_jax.models.classifier import Classifier
from umae_jax.models.masked import MaskedImageModel

COLUMNS = ("size", "method", "image", "parameters", "tokens", "GFLOPs per image")
ROW = "{:<11} {:<11} {:>9} {:>12} {:>7} {:>16}"


def describe(size: str, method: str) -> tuple[str, ...]:
    """Return the row of a model, in the order of COLUMNS."""
    config = default_config(size, method)
    config.dtype = "float32"
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))

    def forward(model: MaskedImageModel | Classifier, images: jax.Array, keys: jax.Array) -> jax.Array:
        if isinstance(model, Classifier):
            return model(images)
        return model(images, model.sample_mask(keys))[0]

    images = jax.ShapeDtypeStruct((1, *config.image_size, config.model.channels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    compiled = jax.jit(forward).lower(model, images, keys).compile()
    patches = config.image_size[0] * config.image_size[1] // config.model.patch**2
    tokens = patches // (4 if "decoder_width" in config.model else 1) + (len(config.model.depths) == 1)
    flops = (compiled.cost_analysis() or {})["flops"] / 1e9
    image = "{} x {}".format(*config.image_size)
    return size, method, image, f"{parameters:,}", f"{tokens:,}", f"{flops:.2f}"


def main(*sizes: str) -> None:
    """Print the methods, and the table row by row."""
    models = list_models()
    unknown = [size for size in sizes if size not in models]
    require(not unknown, f"there is no size {', '.join(unknown)}; choose {', '.join(models)}")
    for name, method in METHODS.items():
        console.result(f"{name:<11} {method.summary}")
    console.result(f"\n{ROW.format(*COLUMNS)}")
    for size in sizes or models:
        for name in models[size]:
            console.result(ROW.format(*describe(size, name)))


if __name__ == "__main__":
    cli.run(main, arguments=len(sys.argv))
