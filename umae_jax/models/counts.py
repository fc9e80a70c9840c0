"""Count the parameters, encoder tokens and FLOPs of the presets.

    python -m umae_jax.models.counts

writes counts.json, from which `python -m umae_jax.models` prints its table without JAX.
"""

import json

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax import cli
from umae_jax.api import list_models
from umae_jax.config import default_config
from umae_jax.files import write_atomic
from umae_jax.model_table import COUNTS, Counts
from umae_jax.models.build import build_model
from umae_jax.models.classifier import Classifier
from umae_jax.models.masked import MaskedImageModel


def count(size: str, method: str) -> Counts:
    """Count a preset at its image size."""
    config = default_config(size, method)
    config.dtype = "float32"
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))

    def forward(model: MaskedImageModel | Classifier, images: jax.Array, keys: jax.Array) -> jax.Array:
        if isinstance(model, Classifier):
            return model(images)
        return model(images, model.sample_mask(keys))[0]

    images = jax.ShapeDtypeStruct((1, *config.image_size, config.model.channels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    lowered = jax.jit(forward).trace(model, images, keys).lower(lowering_platforms=("cpu",))  # which counts FLOPs
    patches = config.image_size[0] * config.image_size[1] // config.model.patch**2
    return Counts(
        parameters=count_parameters(model),
        tokens=patches // (4 if "decoder_width" in config.model else 1) + (len(config.model.depths) == 1),
        flops=round((lowered.cost_analysis() or {})["flops"]),
    )


def count_parameters(model: nnx.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))


def main() -> None:
    """Write counts.json, a line per model."""
    models = [(size, method) for size, methods in list_models().items() for method in methods]
    lines = [f'"{size} {method}": {json.dumps(count(size, method)._asdict())}' for size, method in models]
    write_atomic(COUNTS, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


if __name__ == "__main__":
    cli.run(main)
