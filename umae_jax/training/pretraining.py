"""What pre-training trains: a masked image model, its loss on a batch of uint8 images, and its state."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.config import CONFIG_FILE, read_config
from umae_jax.data.loader import Batch
from umae_jax.data.on_device import normalize, random_flip, sample_keys
from umae_jax.errors import UserError, require
from umae_jax.models.build import build_model
from umae_jax.models.masked import MaskedImageModel
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.mesh import batch_sharding, make_mesh, state_shardings
from umae_jax.training.optimizer import make_optimizer
from umae_jax.training.step import LossFunction, Params, TrainState, init_state


class Pretraining(NamedTuple):
    """A model to pre-train, before any array exists.

    Attributes:
        graph: the model without its parameters; `nnx.merge(graph, params)` puts them together.
        optimizer: Optax's, without the learning rate.
        state: the train state's shapes, dtypes and shardings.
    """

    graph: nnx.GraphDef[MaskedImageModel]
    optimizer: optax.GradientTransformation
    state: TrainState


def _initial_params(config: ConfigDict) -> Params:
    return nnx.state(build_model(config, nnx.Rngs(config.seed)), nnx.Param)


def describe(config: ConfigDict, mesh: Mesh) -> Pretraining:
    """What a configuration trains, in shapes alone.

    Raises:
        UserError: if the model's numbers do not fit together.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(lambda: init_state(_initial_params(config), optimizer))
    state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )
    return Pretraining(graph, optimizer, state)


def initialize(config: ConfigDict, pretraining: Pretraining) -> TrainState:
    """The first state, each array born on the devices that keep it."""
    shardings = jax.tree.map(lambda array: array.sharding, pretraining.state)
    return jax.jit(lambda: init_state(_initial_params(config), pretraining.optimizer), out_shardings=shardings)()


def make_loss(config: ConfigDict, graph: nnx.GraphDef[MaskedImageModel]) -> LossFunction:
    """The loss of parameters on a batch: flip, normalise and mask by each sample's own key, then the model's loss."""
    mean, std = config.data.mean, config.data.std

    def loss(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, params)
        keys = jax.vmap(jax.random.split)(sample_keys(config.seed, batch.sample_index))
        images = normalize(random_flip(batch.image, keys[:, 0]), mean, std)
        return model(images, model.sample_mask(keys[:, 1]))[0]

    return loss


class PretrainedRun(NamedTuple):
    """What a run's directory holds: its configuration, and the newest parameters with their step."""

    config: ConfigDict
    graph: nnx.GraphDef[MaskedImageModel]
    params: Params
    step: int


def read_run(workdir: Path) -> PretrainedRun:
    """Read the newest whole checkpoint of a pre-training run, onto every device.

    Raises:
        UserError: if the directory holds none.
    """
    config_file = workdir / CONFIG_FILE
    require(config_file.is_file(), f"--workdir: {workdir} holds no run: there is no {CONFIG_FILE} in it")
    config = read_config(config_file)
    what = describe(config, make_mesh())
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore_params(what.state.params)
    checkpoints.close()
    if restored is None:
        raise UserError(f"--workdir: {workdir} holds no checkpoint that can be read; let the run reach its first one")
    return PretrainedRun(config, what.graph, *restored)


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
