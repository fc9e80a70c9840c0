"""The training state: in shapes alone, and freshly initialised."""

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
    """Everything on the devices that a run continues from.

    Attributes:
        step: int32, updates attempted so far.
        params: the model's parameters.
        optimizer: Optax's state.
        bad_steps: int32, consecutive attempts, up to now, whose loss or gradient was not finite.
        skipped_updates: int32, all such attempts.
        ema: exponential moving average of the parameters, where one is kept.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    bad_steps: jax.Array
    skipped_updates: jax.Array
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and export: the moving average where one is kept."""
        return self.params if self.ema is None else self.ema


def init_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Return the state before the first step.

    Args:
        params: of the model.
        optimizer: Optax's.
        ema: keep a moving average of the parameters.
    """
    # Three arrays, not one three times: the step donates each.
    step, bad_steps, skipped_updates = (jnp.zeros((), jnp.int32) for _ in range(3))
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(step, params, optimizer.init(params), bad_steps, skipped_updates, copy)


class AbstractRun(NamedTuple):
    """A model and its training state in shapes, before any array exists.

    Attributes:
        graph: the model without its parameters; `nnx.merge(graph, params)` gives the model.
        optimizer: Optax's, without the learning rate.
        state: shapes, dtypes and shardings of the training state.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState


class _Keys:
    """Gives the keys of `nnx.Rngs(seed)`, counted in Python: traced counters take most of the time of building."""

    def __init__(self, seed: int) -> None:
        self._key = jax.random.key(seed)
        self._given = 0

    def params(self) -> jax.Array:
        self._given += 1
        return jax.random.fold_in(self._key, self._given - 1)


def _build_model(task: BaseTask) -> nnx.Module:
    return task.build_model(cast(nnx.Rngs, _Keys(task.config.seed)))


def abstract_run(task: BaseTask, mesh: Mesh) -> AbstractRun:
    """Build model and state in shapes alone.

    Raises:
        UserError: if the numbers of the configuration do not fit together.
    """
    model = nnx.eval_shape(lambda: _build_model(task))
    graph, params = nnx.split(model, nnx.Param)
    recipe = task.config.optimizer
    optimizer = make_optimizer(recipe, lambda name: task.layer_index(model, name))
    state = jax.eval_shape(lambda params: init_state(params, optimizer, ema=recipe.ema_decay is not None), params)
    state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )
    return AbstractRun(graph, optimizer, state)


def initialize(task: BaseTask, run: AbstractRun, given: Params | None = None) -> TrainState:
    """Return the first state; each array is created on the devices that hold it.

    Args:
        task: of the run.
        run: from `abstract_run`.
        given: parameters on the host that replace those the model draws; all of them or some.
    """
    shardings = shardings_of(run.state)
    places = dict(nnx.to_flat_state(shardings.params))
    arrays = [] if given is None else nnx.to_flat_state(given)
    placed = [_place(array[...], places[path].get_value()) for path, array in arrays]

    def begin(placed: list[jax.Array]) -> TrainState:
        params = dict(nnx.to_flat_state(nnx.state(_build_model(task), nnx.Param)))
        for (path, _), array in zip(arrays, placed, strict=True):
            params[path] = params[path].replace(array)
        return init_state(nnx.from_flat_state(params), run.optimizer, ema=run.state.ema is not None)

    return jax.jit(begin, out_shardings=shardings)(placed)


def _place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:  # noqa: ANN401 - of the host or any device
    """Put an array that each process holds whole where it belongs, without comparing it among processes first."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
