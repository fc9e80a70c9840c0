"""A task defined outside the package: a linear layer that regresses the mean colour of noise images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umae_jax.config.base import Method
from umae_jax.data.pipeline import EvalLoader, Readers, Sample
from umae_jax.multihost import all_gather_json
from umae_jax.training.sharding import batch_sharding, local_rows
from umae_jax.training.task import BaseTask, Hook

METHOD = Method(summary="mean colours", task=__name__, keys={})


def load(index, record=None):
    image = np.random.default_rng((index if record is None else record) + 1).integers(0, 256, (4, 4, 3), np.uint8)
    return Sample({"image": image, "colour": np.float32(image.mean((0, 1)) / 255)}, ())


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, images):
        return self.linear(images.reshape(images.shape[0], -1).astype(jnp.float32) / 255)


class Task(BaseTask):
    command, best_metric, measured_last, num_samples = "toy", "negative_error", "negative_error", 20

    def batch(self):
        return {"image": jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8), "colour": jax.ShapeDtypeStruct((3,), jnp.float32)}

    def build_model(self, rngs):
        return Model(rngs)

    def loss(self, model, batch):
        error = jnp.square(model(batch["image"]) - batch["colour"])
        return error.mean(), {"red_error": error[:, 0].mean()}

    def open(self):
        pass

    def sample_loader(self):
        return load

    def hooks(self, context):
        return [Hook(4, lambda _, params: self.measure(context.graph, params, context.mesh, 16), self.best_metric)]

    def evaluate(self, run, mesh, batch_size):
        return "mean colours", self.measure(run.graph, run.params, mesh, batch_size)

    def measure(self, graph, params, mesh, batch_size):
        loader = EvalLoader(20, load, batch_size=batch_size, sharding=batch_sharding(mesh), readers=Readers(1))
        error = jax.jit(lambda params, batch: jnp.abs(nnx.merge(graph, params)(batch["image"]) - batch["colour"]))
        errors = [local_rows(error(params, batch))[local_rows(batch["valid"])] for batch in loader]
        errors = np.concatenate(all_gather_json(np.concatenate(errors).tolist()))  # a different number per process
        return {"negative_error": -float(errors.mean()), "evaluated": len(errors)}
