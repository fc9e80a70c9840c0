"""The training step: one pure compiled function of (state, batch), whatever the task."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umae_jax.models.kernels import compiler_options
from umae_jax.training.sharding import replicated, shardings_of
from umae_jax.training.state import TrainState
from umae_jax.training.task import BaseTask, Batch, Params


class Outputs(NamedTuple):
    """The outputs of a loss function beside the loss."""

    scalars: dict[str, jax.Array]  # to report, by name
    statistics: Params | None = None  # new running statistics, such as those of BatchNorm; a part of the parameters


LossFunction = Callable[[Params, Batch], tuple[jax.Array, Outputs]]  # (parameters, batch) -> mean loss, outputs
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def loss_function(task: BaseTask, graph: nnx.GraphDef) -> LossFunction:
    """Return the loss of a task as a pure function; `graph` is the task's model without parameters."""

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Outputs]:
        model = nnx.merge(graph, params)
        value, scalars = task.loss(model, batch)
        return value, Outputs(scalars, nnx.state(model, nnx.BatchStat))  # the task has updated them

    return loss


def _split(batch: Batch, parts: int, group_size: int) -> Batch:
    """Split a batch into microbatches, [parts, B / parts, ...], each of samples from all devices.

    Microbatch i takes every `parts`-th group of neighbouring samples, starting at group i.
    """

    def deal(x: jax.Array) -> jax.Array:
        groups = x.reshape(-1, parts, group_size, *x.shape[1:]).swapaxes(0, 1)
        return groups.reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(deal, batch)


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    grad_accum_steps: int = 1,
    group_size: int = 1,
    ema_decay: float | None = None,
    shardings: Params | None = None,
) -> TrainStep:
    """Build the step: (state, batch) -> (state, scalars to report).

    The scalars are `loss`, `gradient_norm` (global, before clipping), `learning_rate`, `bad_steps`, `skipped_updates`
    and those of the loss.

    An update whose loss or gradient is not finite is skipped: parameters and optimizer state keep their values. The
    learning rate follows the state's step, not a counter of the optimizer, so a skipped update does not delay the
    schedule. (`optax.apply_if_finite` applies non-finite updates after several in a row, and ignores the loss.)

    Args:
        loss: see `LossFunction`. Gradients of running statistics must be zero.
        optimizer: Optax transformation without a learning rate; the step multiplies its updates by the schedule's.
        schedule: step -> learning rate.
        grad_accum_steps: number of microbatches per step.
        group_size: number of neighbouring samples that stay in one microbatch.
        ema_decay: decay of the EMA of the parameters; None: the state has no EMA.
        shardings: `NamedSharding`s of the parameters. Sharded parameters are gathered before use; their gradients are
            summed and sharded again.
    """

    def gather(param: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.lax.with_sharding_constraint(param, NamedSharding(sharding.mesh, PartitionSpec()))

    def value_and_grad(params: Params, batch: Batch) -> tuple[tuple[jax.Array, Outputs], Params]:
        if shardings is None:
            return jax.value_and_grad(loss, has_aux=True)(params, batch)

        # Gather inside the differentiated function, so that gradients are sharded only after their sum. With a gather
        # outside, the compiler emits loops of collective permutes that cost more time than they hide.
        def sharded_loss(params: Params, batch: Batch) -> tuple[jax.Array, Outputs]:
            return loss(jax.tree.map(gather, params, shardings), batch)

        value, gradient = jax.value_and_grad(sharded_loss, has_aux=True)(params, batch)
        return value, jax.lax.with_sharding_constraint(gradient, shardings)

    def accumulate(params: Params, batch: Batch) -> tuple[tuple[jax.Array, Outputs], Params]:
        if grad_accum_steps == 1:
            return value_and_grad(params, batch)
        parts = _split(batch, grad_accum_steps, group_size)

        def add(total: Any, part: Batch) -> tuple[Any, None]:  # noqa: ANN401 - a pytree
            return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, params, first))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / grad_accum_steps, total)

    def update(
        gradient: Params, statistics: Params | None, learning_rate: jax.Array, params: Params, state: optax.OptState
    ) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction mixes float and int32
            direction, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda param, change: param - learning_rate * change, params, direction)
        return nnx.merge_state(params, statistics) if statistics else params, state

    def select(
        finite: jax.Array, gradient: Params, statistics: Params | None, learning_rate: jax.Array, *old: Params
    ) -> tuple[Params, optax.OptState]:
        return jax.tree.map(partial(jnp.where, finite), update(gradient, statistics, learning_rate, *old), old)

    def branch(finite: jax.Array, *operands: Params) -> tuple[Params, optax.OptState]:
        return jax.lax.cond(finite, update, lambda _gradient, _statistics, _rate, *old: old, *operands)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, outputs), gradient = accumulate(state.params, batch)
        learning_rate = jnp.asarray(schedule(state.step.astype(jnp.float32)), jnp.float32)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            # A select makes XLA:CPU copy the moments first; a branch makes a GPU wait for its host.
            params, optimizer_state = jax.lax.platform_dependent(
                *(finite, gradient, outputs.statistics, learning_rate, state.params, state.optimizer),
                cpu=branch,
                default=select,
            )
            ema = state.ema
            if ema_decay is not None:
                ema = optax.incremental_update(params, ema, 1 - ema_decay)
        skipped = 1 - finite.astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            bad_steps=(state.bad_steps + 1) * skipped,
            skipped_updates=state.skipped_updates + skipped,
            ema=ema,
        )
        metrics = {"loss": value, "gradient_norm": norm, "learning_rate": learning_rate}
        metrics |= {"bad_steps": new.bad_steps, "skipped_updates": new.skipped_updates, **outputs.scalars}
        return new, metrics

    return train_step


def lower_step(train_step: TrainStep, state: TrainState, batch: Batch, mesh: Mesh) -> jax.stages.Lowered:
    """Lower the step for ahead-of-time compilation; the step donates its state.

    `state` and `batch` hold arrays or `jax.ShapeDtypeStruct`s with shardings. The new state has the state's shardings.
    """
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings_of(state), replicated(mesh)),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )
    with jax.set_mesh(mesh):  # kernels read from it how the batch is sharded
        return jitted.lower(state, batch)
