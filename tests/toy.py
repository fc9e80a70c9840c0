"""A task defined outside the package: a linear layer that regresses the mean colour of noise images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umae_jax.data.pipeline import EvalLoader, Readers, Sample
from umae_jax.multihost import gather_rows
from umae_jax.training.sharding import batch_sharding, local_rows
from umae_jax.training.task import BaseTask, Hook


def load(index, record=None):
    image = np.random.default_rng((index if record is None else record) + 1).integers(0, 256, (4, 4, 3), np.uint8)
    return Sample({"image": image, "colour": np.float32(image.mean((0, 1)) / 255)}, ())


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, images):
        return self.linear(images.reshape(images.shape[0], -1).astype(jnp.float32) / 255)


class Task(BaseTask):
    command, best_metric, num_samples = "toy", "negative_error", 20

    def batch(self):
        return {"image": jax.ShapeDtypeStruct((4, 4, 3), jnp.uint8), "colour": jax.ShapeDtypeStruct((3,), jnp.float32)}

    def build_model(self, rngs):
        return Model(rngs)

    def loss(self, model, batch):
        error = jnp.square(model(batch["image"]) - batch["colour"])
        return error.mean(), {"red_error": error[:, 0].mean()}

    def open(self):
        self.measured_last = self.best_metric

    def sample_loader(self):
        return load

    def hooks(self, context):
        predict = jax.jit(lambda params, images: nnx.merge(context.graph, params)(images))

        def evaluate(step, params):
            errors, sharding = [], batch_sharding(context.mesh)
            for batch in EvalLoader(20, load, batch_size=16, sharding=sharding, readers=Readers(1, 0)):
                context.check()
                error = jnp.abs(predict(params, batch["image"]) - batch["colour"]).mean(-1)
                errors.append(local_rows(error)[local_rows(batch["valid"])])
            errors = gather_rows(np.concatenate(errors))  # a different number per process
            return {"negative_error": -float(errors.mean()), "evaluated": len(errors)}

        return [Hook(4, evaluate, self.best_metric)]
