"""List the presets: parameters, tokens in the encoder, and work for an image at the paper's size.

    python -m umae_jax.models [SIZE ...]

The work is XLA's own count for the compiled forward pass of one image, in float32, masking, loss and head included.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax import cli
from umae_jax.config import default_config
from umae_jax.errors import require
from umae_jax.models.build import build_model
from umae_jax.models.classifier import Classifier
from umae_jax.models.masked import MaskedImageModel
from umae_jax.models.presets import METHODS, SIZES, methods_of

COLUMNS = ("size", "method", "image", "parameters", "tokens", "GFLOPs an image")
ROW = "{:<11} {:<11} {:>9} {:>12} {:>7} {:>16}"


def describe(size: str, method: str) -> tuple[str, ...]:
    """One row of the table."""
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
    tokens = patches // (4 if method in ("um_mae", "mae") else 1) + (config.model.encoder == "vit")
    flops = (compiled.cost_analysis() or {})["flops"] / 1e9
    image = "{} x {}".format(*config.image_size)
    return size, method, image, f"{parameters:,}", f"{tokens:,}", f"{flops:.2f}"


def main(*sizes: str) -> None:
    """Print the table, row by row."""
    unknown = [size for size in sizes if size not in SIZES]
    require(not unknown, f"there is no size {', '.join(unknown)}; choose {', '.join(SIZES)}")
    for method, what in METHODS.items():
        print(f"{method:<11} {what}")  # noqa: T201 - the result
    print(f"\n{ROW.format(*COLUMNS)}")  # noqa: T201
    for size in sizes or SIZES:
        for method in methods_of(size):
            print(ROW.format(*describe(size, method)), flush=True)  # noqa: T201


if __name__ == "__main__":
    cli.run(main, arguments=len(sys.argv))
