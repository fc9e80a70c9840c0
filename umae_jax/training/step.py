"""The training step, one pure compiled function of (state, batch), whatever is trained."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from umae_jax.data.pipeline import Batch
from umae_jax.models.kernels import compiler_options
from umae_jax.training.sharding import replicated, shardings_of

Params = Any  # a pytree of float32 arrays
LossFunction = Callable[[Params, Batch], jax.Array]


class TrainState(NamedTuple):
    """All that a run continues from, but for its place in the data, which follows from `samples`.

    Attributes:
        step: int32, updates tried so far.
        params: the model's parameters.
        optimizer: Optax's state.
        bad_steps: int32, tries in a row, up to now, whose loss or gradient was not finite.
        skipped_updates: int32, such tries in all.
        skipped_images: int32, images in all that could not be read.
        average: the moving average of the parameters, where one is kept.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    bad_steps: jax.Array
    skipped_updates: jax.Array
    skipped_images: jax.Array
    average: Params | None = None

    @property
    def result(self) -> Params:
        """The parameters that count: their average where one is kept."""
        return self.params if self.average is None else self.average


class Metrics(NamedTuple):
    """What a step reports, scalars on the device.

    Attributes:
        loss: mean over the batch.
        gradient_norm: global, before clipping.
        learning_rate: of this update.
        bad_steps, skipped_updates, skipped_images: as in the state after this step.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    bad_steps: jax.Array
    skipped_updates: jax.Array
    skipped_images: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(params: Params, optimizer: optax.GradientTransformation, *, average: bool = False) -> TrainState:
    """The state before the first step.

    Args:
        average: whether to keep a moving average of the parameters.
    """
    # Four arrays, not one four times: the step donates each.
    step, bad_steps, skipped_updates, skipped_images = (jnp.zeros((), jnp.int32) for _ in range(4))
    copy = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(step, params, optimizer.init(params), bad_steps, skipped_updates, skipped_images, copy)


def _gradient(
    value_and_gradient: Callable[[Params, Batch], tuple[jax.Array, Params]], params: Params, batch: Batch, parts: int
) -> tuple[jax.Array, Params]:
    """Loss and gradient of a batch, computed in `parts` equal parts one after the other."""
    if parts == 1:
        return value_and_gradient(params, batch)
    # Every part takes each `parts`-th pair of neighbours, which may be mixed with each other, or each `parts`-th sample
    # where pairs do not divide: so it stays spread over all devices.
    size = batch.sample_index.shape[0] // parts
    group = 2 if size % 2 == 0 else 1

    def deal(x: jax.Array) -> jax.Array:
        dealt = x.reshape(size // group, parts, group, *x.shape[1:]).swapaxes(0, 1)
        return dealt.reshape(parts, size, *x.shape[1:])

    split = jax.tree.map(deal, batch)

    def add(total: tuple[jax.Array, Params], part: Batch) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(jnp.add, total, value_and_gradient(params, part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda x: x / parts, total)


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    grad_accum_steps: int = 1,
    average: float | None = None,
    shardings: Params | None = None,
) -> TrainStep:
    """Build the step: state, batch -> state, metrics.

    Args:
        loss_function: mean over a batch.
        optimizer: the direction of an update.
        schedule: from step to learning rate.
        grad_accum_steps: parts that a batch is computed in.
        average: decay of the moving average in a state that keeps one.
        shardings: of the parameters, `NamedSharding`s. Those that are split are gathered before they are used, and
            their gradients summed and split again.

    The learning rate follows the state's step rather than a counter of the optimiser's, so that an update skipped
    for a loss or gradient that is not finite leaves the schedule in its place and everything else untouched.
    """

    def gather(param: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.lax.with_sharding_constraint(param, NamedSharding(sharding.mesh, PartitionSpec()))

    def value_and_gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        if shardings is None:
            return jax.value_and_grad(loss_function)(params, batch)

        # Gathered inside what is differentiated, so that a gradient is whole until it has been summed. Else the
        # compiler passes the parts of each kernel, or of its gradient, around in a loop of permutations, which for
        # kernels of this size costs more than it hides (Swin-T on v5e:2x4, 32 images a chip: 55.3 million cycles where
        # they are gathered outside, and 47.2 million so).
        def loss_of_parts(params: Params, batch: Batch) -> jax.Array:
            return loss_function(jax.tree.map(gather, params, shardings), batch)

        loss, gradient = jax.value_and_grad(loss_of_parts)(params, batch)
        return loss, jax.lax.with_sharding_constraint(gradient, shardings)

    def update(
        gradient: Params, learning_rate: jax.Array, params: Params, state: optax.OptState
    ) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction mixes float and int32
            direction, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda param, change: param - learning_rate * change, params, direction), state

    def choose(
        finite: jax.Array, gradient: Params, learning_rate: jax.Array, *old: Params
    ) -> tuple[Params, optax.OptState]:
        return jax.tree.map(partial(jnp.where, finite), update(gradient, learning_rate, *old), old)

    def branch(finite: jax.Array, *operands: Params) -> tuple[Params, optax.OptState]:
        return jax.lax.cond(finite, update, lambda gradient, learning_rate, *old: old, *operands)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradient = _gradient(value_and_gradient, state.params, batch, grad_accum_steps)
        learning_rate = jnp.asarray(schedule(state.step.astype(jnp.float32)), jnp.float32)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradient)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            # A choice between new and old makes XLA:CPU copy the moments first; a branch makes a GPU wait for its host.
            params, optimizer_state = jax.lax.platform_dependent(
                *(finite, gradient, learning_rate, state.params, state.optimizer), cpu=branch, default=choose
            )
            averaged = state.average
            if average is not None:
                # Where an update was skipped the parameters stay finite, and the average moves on towards them.
                averaged = jax.tree.map(lambda old, new: old + (1 - average) * (new - old), averaged, params)
        skipped = 1 - finite.astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            bad_steps=(state.bad_steps + 1) * skipped,
            skipped_updates=state.skipped_updates + skipped,
            skipped_images=state.skipped_images + batch.unreadable.sum(dtype=jnp.int32),
            average=averaged,
        )
        metrics = Metrics(loss, norm, learning_rate, new.bad_steps, new.skipped_updates, new.skipped_images)
        return new, metrics

    return train_step


def lower_step(train_step: TrainStep, state: TrainState, batch: Batch, mesh: Mesh) -> jax.stages.Lowered:
    """The step ready to be compiled ahead of time, so that nothing compiles later on; it donates its state.

    Args:
        state, batch: arrays or `jax.ShapeDtypeStruct`s, with the shardings that the step takes, and gives back.
    """
    shardings = shardings_of(state)
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )
    with jax.set_mesh(mesh):  # by which kernels know how the batch is split
        return jitted.lower(state, batch)
