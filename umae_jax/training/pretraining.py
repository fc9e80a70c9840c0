"""What pre-training adds to a run: the loss of a masked image model on a batch of uint8 images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.loader import Batch
from umae_jax.data.on_device import normalize, random_flip, sample_keys
from umae_jax.training.mesh import batch_sharding
from umae_jax.training.step import LossFunction, Params


def make_loss(config: ConfigDict, graph: nnx.GraphDef) -> LossFunction:
    """The loss of parameters on a batch: flip, normalise and mask by each sample's own key, then the model's loss.

    Args:
        graph: of a `MaskedImageModel`.
    """
    mean, std = config.data.mean, config.data.std

    def loss(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        keys = jax.vmap(jax.random.split)(sample_keys(config.seed, batch.sample_index))
        images = normalize(random_flip(batch.image, keys[:, 0]), mean, std)
        return model(images, model.sample_mask(keys[:, 1]))[0]

    return loss


def abstract_batch(config: ConfigDict, mesh: Mesh) -> Batch:
    """Shapes, dtypes and sharding of a batch."""

    def array(*shape: int, dtype: np.dtype | type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=batch_sharding(mesh))

    return Batch(
        image=array(*config.image_size, config.model.channels, dtype=jnp.uint8),
        sample_index=array(dtype=jnp.uint32),
        label=array(dtype=jnp.int32),
        unreadable=array(dtype=jnp.int32),
    )
