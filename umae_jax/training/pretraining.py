"""What pre-training adds to a run: the loss of a masked image model on a batch of uint8 images."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.data.on_device import random_flip, sample_keys
from umae_jax.data.pipeline import Batch
from umae_jax.training.step import LossFunction, Params


def make_loss(config: ConfigDict, graph: nnx.GraphDef) -> LossFunction:
    """The loss of parameters on a batch: flip and mask by each sample's own key, then the model's loss.

    Args:
        graph: of a `MaskedImageModel`.
    """

    def loss(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        with jax.named_scope("images"):
            keys = jax.vmap(jax.random.split)(sample_keys(config.seed, batch.sample_index))
            images, mask = random_flip(batch.image, keys[:, 0]), model.sample_mask(keys[:, 1])
        return model(images, mask)[0]

    return loss
