"""A run from its directory to its end, whatever it trains: open the directory, continue or begin, compile, train."""

import contextlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import beginning, cli
from umae_jax.config import CONFIG_FILE, differences, read_config, resolve_steps, to_json
from umae_jax.data.pipeline import TrainLoader, abstract_batch
from umae_jax.data.sources import Source
from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath, write_whole
from umae_jax.multihost import StopSignal, Watchdog, broadcast_json
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.loop import Action, train
from umae_jax.training.metrics import metrics_of
from umae_jax.training.optimizer import learning_rate_schedule
from umae_jax.training.runs import Run
from umae_jax.training.sharding import batch_sharding, shardings_of
from umae_jax.training.step import LossFunction, TrainState, TrainStep, lower_step, make_train_step

MAX_SAMPLES = 2**32  # sample indices are 32-bit


class Task(NamedTuple):
    """What a run trains.

    Attributes:
        run: the model and its state, in shapes.
        source: the images.
        loss: of parameters on a batch.
        begin: makes the first state, when there is no checkpoint.
        actions: makes what is done between steps, from the step that the run goes on from.
        measured: metrics that these write, also of the last step.
    """

    run: Run
    source: Source
    loss: LossFunction
    begin: Callable[[], TrainState]
    actions: Callable[[int], Sequence[Action]]
    measured: tuple[str, ...] = ()


def durations(config: ConfigDict, images: int) -> tuple[int, int]:
    """The run's length and its warm-up, in steps.

    Raises:
        UserError: if there is nothing to do, or more than can be counted.
    """
    total = resolve_steps(config, "total", images, config.batch_size)
    require(total > 0, "total_steps: the run has no steps; set total_steps, total_examples or total_epochs")
    require(
        total * config.batch_size < MAX_SAMPLES,
        f"total_steps: {total} steps of {config.batch_size} images are more than a run can count, {MAX_SAMPLES}",
    )
    warmup = resolve_steps(config, "optimizer.warmup", images, config.batch_size)
    if warmup > total:
        cli.say(f"the warm-up of {warmup} steps is cut to the {total} of the run")
    return total, min(warmup, total)


def check_same_model(old: ConfigDict, new: ConfigDict, workdir: AnyPath) -> None:
    """Check that a run may continue in a directory; say what else has changed.

    Raises:
        UserError: if the directory's checkpoints belong to another model or batch size.
    """
    changed = differences(old, new)
    if "batch_size" in changed:
        before, after = changed["batch_size"]
        raise UserError(
            f"batch_size is {before} in {workdir}, {after} here, and a run keeps the one its steps are counted in; "
            "set it back (grad_accum_steps computes it in parts, to save memory) or choose another --workdir"
        )
    names, wanted = changed.pop("data.class_names", ((), ()))
    if names:  # () comes from a file that did not tell them
        both = zip_longest(names, wanted, fillvalue="none")
        others = [f"{ours} is {theirs} here" for ours, theirs in both if ours != theirs]
        raise UserError(f"{workdir} holds a classifier of other classes ({listing(others)}); choose another --workdir")
    if new.model.method != "classifier":
        changed.pop("model.classes", None)
    of_model = ("image_size", "optimizer.ema_decay")
    model = {key: values for key, values in changed.items() if key.startswith("model.") or key in of_model}
    model = {key: values for key, values in model.items() if key == "model.method"} or model  # which says it all
    if model:
        fields = "; ".join(f"{key} is {before} there, {after} here" for key, (before, after) in model.items())
        raise UserError(f"{workdir} holds checkpoints of another model ({fields}); choose another --workdir")
    if changed.pop("init", None):
        cli.say("init has changed, and is not read again: the run continues from its own checkpoint")
    for key, (before, after) in changed.items():
        cli.say(f"continuing with {key} = {after} (was {before})")


def open_workdir(config: ConfigDict, workdir: AnyPath) -> Checkpoints:
    """Make the directory this run's, and open its checkpoints.

    Raises:
        UserError: if it holds those of another model.
        OSError: if it cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every)
    config_file = workdir / CONFIG_FILE
    if checkpoints.any():
        require(
            config_file.is_file(),
            f"{workdir} holds checkpoints but no {CONFIG_FILE} to say of which model; choose another --workdir",
        )
        check_same_model(read_config(config_file), config, workdir)
    if jax.process_index() == 0:
        write_whole(config_file, to_json(config).encode())
    return checkpoints


def build_step(config: ConfigDict, run: Run, loss: LossFunction, warmup_steps: int, total_steps: int) -> TrainStep:
    """The training step of a configuration, not yet compiled.

    Args:
        config: of the run.
        run: its model and state; the step splits what these shapes say is split.
        loss: mean over a batch.
        warmup_steps, total_steps: of the learning rate.

    Raises:
        UserError: if it is to have a kernel that the devices cannot run.
    """
    device: Any = next(iter(run.state.step.sharding.device_set))
    require(
        device.platform == "tpu" or not config.fused_attention,
        f"fused_attention: the kernel is written for TPUs, not for {device.platform} devices; leave it False",
    )
    schedule = learning_rate_schedule(
        config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
    )
    return make_train_step(
        loss,
        run.optimizer,
        schedule,
        grad_accum_steps=config.grad_accum_steps,
        average=config.optimizer.ema_decay,
        shardings=shardings_of(run.state.params),
    )


def run_training(
    config: ConfigDict, workdir: AnyPath, mesh: Mesh, task: Task, stop: StopSignal, step_timeout: float = 0
) -> None:
    """Train to the end, from the newest whole checkpoint in the directory if there is one.

    Raises:
        Preempted: when asked to leave, after saving.
        UserError: if the directory belongs to another run, or training cannot go on; see `loop.train`.
    """
    with contextlib.ExitStack() as resources:
        total_steps, warmup_steps = durations(config, len(task.source))
        checkpoints = open_workdir(config, workdir)
        resources.callback(checkpoints.close)
        beginning.spent("data and model")
        state, samples = checkpoints.restore(task.run.state) or (task.begin(), 0)
        beginning.spent("the state")
        first_step = int(state.step)
        parameters = sum(array.size for array in jax.tree.leaves(state.params))
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
        cli.say(f"{parameters:,} parameters, {len(task.source):,} images, {devices}")
        done = broadcast_json(sorted(metrics_of(workdir, first_step)))
        # A signal may have come when the last step was done, and what is to be measured then was not.
        if first_step > total_steps or (first_step == total_steps and set(task.measured) <= set(done)):
            cli.say(f"{workdir} has reached step {first_step} already; set total_steps above that to go on")
            return
        if first_step:
            cli.say(f"continuing at step {first_step} of {total_steps}")
        # The loader reads ahead while the step compiles.
        loader = TrainLoader.of(config, task.source, batch_sharding(mesh), first_sample=samples)
        resources.callback(loader.close)
        batch = abstract_batch(config, config.batch_size, batch_sharding(mesh))
        step = build_step(config, task.run, task.loss, warmup_steps, total_steps)
        compiled = lower_step(step, task.run.state, batch, mesh).compile()
        beginning.spent("compiling")
        train(
            state,
            step=compiled,
            batches=loader,
            first_step=first_step,
            samples=samples,
            total_steps=total_steps,
            batch_size=config.batch_size,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            stop_after_bad_steps=config.stop_after_bad_steps,
            stop=stop,
            watchdog=Watchdog(step_timeout),
            workdir=workdir,
            actions=task.actions(first_step),
            done=done,
        )
        cli.say(f"finished {total_steps} steps; everything is in {workdir}")
