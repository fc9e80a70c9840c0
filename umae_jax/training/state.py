"""The training state: abstract (shapes only), and freshly initialised."""

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from umae_jax.training.optimizer import make_optimizer
from umae_jax.training.sharding import shardings_of, state_shardings
from umae_jax.training.task import BaseTask, Params


class TrainState(NamedTuple):
    """The state on the devices that checkpoints store.

    Attributes:
        step: int32, number of steps, including skipped updates.
        params: the model's parameters, and its running statistics if it has any.
        optimizer: Optax's state.
        bad_steps: int32, number of consecutive steps, up to now, whose loss or gradient was not finite.
        skipped_updates: int32, total number of such steps.
        ema: exponential moving average of the parameters; None: not kept.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    bad_steps: jax.Array
    skipped_updates: jax.Array
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """Parameters to evaluate and export: the moving average if it is kept."""
        return self.params if self.ema is None else self.ema


def init_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Return the state before the first step; with `ema`, it keeps a moving average of the parameters."""
    # Three arrays, not one three times: the step donates each.
    step, bad_steps, skipped_updates = (jnp.zeros((), jnp.int32) for _ in range(3))
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(step, params, optimizer.init(params), bad_steps, skipped_updates, copy)


class AbstractRun(NamedTuple):
    """A model and its training state, in shapes only.

    Attributes:
        graph: the model without `state.params`; `nnx.merge(graph, params)` gives the model.
        optimizer: Optax transformation without the learning rate.
        state: shapes, dtypes and shardings of the training state.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState


def _build_model(task: BaseTask) -> nnx.Module:
    """Build the model with the keys of `nnx.Rngs(seed)`, counted in Python, since tracing its counters is slow."""
    key = jax.random.key(task.config.seed)
    keys = (jax.random.fold_in(key, count) for count in itertools.count())
    return task.build_model(cast(nnx.Rngs, SimpleNamespace(params=lambda: next(keys))))


def abstract_run(task: BaseTask, mesh: Mesh) -> AbstractRun:
    """Build the model and its training state in shapes only.

    Raises:
        UserError: if the numbers of the configuration do not fit together.
    """
    model = nnx.eval_shape(lambda: _build_model(task))
    graph, params = nnx.split(model)
    recipe = task.config.optimizer
    statistics = (".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)))
    optimizer = make_optimizer(recipe, lambda name: task.layer_index(model, name), (*task.frozen, *statistics))
    state = jax.eval_shape(lambda params: init_state(params, optimizer, ema=recipe.ema_decay is not None), params)
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, state_shardings(mesh, state))
    return AbstractRun(graph, optimizer, state)


def initialize(task: BaseTask, run: AbstractRun, given: Params | None = None) -> TrainState:
    """Return the initial state; each array is created on the devices that hold it.

    Args:
        task: of the run.
        run: from `abstract_run`.
        given: values, on the host, for all or some parameters; the others are initialised at random.
    """
    shardings = shardings_of(run.state)
    places = dict(nnx.to_flat_state(shardings.params))
    arrays = [] if given is None else nnx.to_flat_state(given)
    placed = [_place(array[...], places[path].get_value()) for path, array in arrays]

    def begin(placed: list[jax.Array]) -> TrainState:
        params = dict(nnx.to_flat_state(nnx.state(_build_model(task))))
        for (path, _), array in zip(arrays, placed, strict=True):
            params[path] = params[path].replace(array)
        return init_state(nnx.from_flat_state(params), run.optimizer, ema=run.state.ema is not None)

    return jax.jit(begin, out_shardings=shardings)(placed)


def _place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:  # noqa: ANN401 - of the host or any device
    """Shard an array that each process holds whole; unlike `jax.device_put`, do not compare it across processes."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
