"""A run: what a configuration trains, in shapes alone, freshly initialised, or as its directory holds it."""

from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.config import CONFIG_FILE, read_config
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath
from umae_jax.models.build import build_model
from umae_jax.training.checkpoint import BEST, FOLDER, Checkpoints
from umae_jax.training.optimizer import make_optimizer
from umae_jax.training.sharding import make_mesh, shardings_of, state_shardings
from umae_jax.training.step import Params, TrainState, init_state


class Run(NamedTuple):
    """A model to train, before any array exists.

    Attributes:
        graph: the model without its parameters; `nnx.merge(graph, params)` puts them together.
        optimizer: Optax's, without the learning rate.
        state: the train state's shapes, dtypes and shardings.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState


class _Keys:
    """The keys of `nnx.Rngs(seed)`, but Python counts them: where it is traced, that takes most of the building."""

    def __init__(self, seed: int) -> None:
        self._key = jax.random.key(seed)
        self._given = 0

    def params(self) -> jax.Array:
        self._given += 1
        return jax.random.fold_in(self._key, self._given - 1)


def _build(config: ConfigDict) -> nnx.Module:
    return build_model(config, cast(nnx.Rngs, _Keys(config.seed)))


def _initial_params(config: ConfigDict) -> Params:
    return nnx.state(_build(config), nnx.Param)


def describe(config: ConfigDict, mesh: Mesh) -> Run:
    """What a configuration trains, in shapes alone.

    Raises:
        UserError: if the model's numbers do not fit together.
    """
    graph, params = nnx.split(nnx.eval_shape(lambda: _build(config)), nnx.Param)
    optimizer = make_optimizer(config)
    average = config.optimizer.ema_decay is not None
    state = jax.eval_shape(lambda params: init_state(params, optimizer, average=average), params)
    state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )
    return Run(graph, optimizer, state)


def initialize(config: ConfigDict, run: Run, given: Params | None = None) -> TrainState:
    """The first state, each array born on the devices that keep it.

    Args:
        given: parameters to begin with instead of those that the model draws, by the same names; some of them, on the
            host.
    """
    shardings = shardings_of(run.state)
    places = dict(nnx.to_flat_state(shardings.params))
    arrays = [] if given is None else nnx.to_flat_state(given)
    placed = [_place(array[...], places[path].get_value()) for path, array in arrays]

    def begin(placed: list[jax.Array]) -> TrainState:
        params = dict(nnx.to_flat_state(_initial_params(config)))
        for (path, _), array in zip(arrays, placed, strict=True):
            params[path] = params[path].replace(array)
        return _begin(run, nnx.from_flat_state(params))

    return jax.jit(begin, out_shardings=shardings)(placed)


def start_from(run: Run, params: Params) -> TrainState:
    """The first state of a run whose parameters are given, as arrays of the host or of any device."""
    shardings = shardings_of(run.state)
    params = jax.tree.map(_place, params, shardings.params)
    return jax.jit(lambda params: _begin(run, params), out_shardings=shardings)(params)


def _place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:  # noqa: ANN401 - of the host or any device
    """An array of which each process has all, where its parts belong; `device_put` would have all compare it first."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _begin(run: Run, params: Params) -> TrainState:
    return init_state(params, run.optimizer, average=run.state.average is not None)


class StoredRun(NamedTuple):
    """What a run's directory holds: its configuration, and the newest parameters (or their average) with their step."""

    config: ConfigDict
    graph: nnx.GraphDef
    params: Params
    step: int


def read_run(workdir: AnyPath, *, best: bool = False) -> StoredRun:
    """Read the newest whole checkpoint of a run, onto every device.

    Args:
        workdir: the run's directory.
        best: read the one that validation found best instead.

    Raises:
        UserError: if the directory holds none.
    """
    config_file = workdir / CONFIG_FILE
    require(config_file.is_file(), f"{workdir} holds no run: there is no {CONFIG_FILE} in it")
    config = read_config(config_file)
    what = describe(config, make_mesh())
    folder = BEST if best else FOLDER
    require(
        not best or (workdir / BEST).is_dir(),
        f"{workdir} holds no best checkpoint, which fine-tuning with validation keeps; leave out --best",
    )
    checkpoints = Checkpoints(workdir, folder=folder, read_only=True)
    restored = checkpoints.restore_part("params" if what.state.average is None else "average", what.state.params)
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir / folder} holds no checkpoint that can be read; let the run reach its first one")
    return StoredRun(config, what.graph, *restored)
