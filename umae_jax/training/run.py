"""A run on one page, in the order in which things happen: mesh, data, state, restore, compile, loop, evaluate, save."""

import contextlib
import copy
import json
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import startup
from umae_jax.config import (
    CONFIG_FILE,
    check,
    differences,
    old_class_names,
    read_config,
    resolve_steps,
    share_of_run,
    to_json,
)
from umae_jax.console import say
from umae_jax.data.pipeline import TrainLoader, readers
from umae_jax.errors import Preempted, PreemptionRequested, UserError, listing, naming, require
from umae_jax.files import AnyPath, write_atomic
from umae_jax.models.kernels import check_platform
from umae_jax.multihost import StopSignal, Watchdog, all_gather_json, broadcast_json, is_primary
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.clock import Clock
from umae_jax.training.finish import finish
from umae_jax.training.memory import device_bytes, explain_exhaustion, tree_bytes
from umae_jax.training.metrics import Report, metric_history, metric_names
from umae_jax.training.optimizer import learning_rate_schedule
from umae_jax.training.overview import Schedule, check_same_data, data_of, describe
from umae_jax.training.programs import compile_programs, global_batch, memory_of, shapes_of
from umae_jax.training.sharding import batch_sharding, make_mesh, shardings_of
from umae_jax.training.state import AbstractRun, abstract_run, initialize
from umae_jax.training.step import TrainStep, loss_function, lower_step, make_train_step
from umae_jax.training.task import BaseTask, Hook, RunContext
from umae_jax.training.trackers import check_installed
from umae_jax.weights.stored_run import CLASSES_FILE, stored_config

MAX_SAMPLES = 2**32  # sample indices are 32-bit
CHECKPOINTS_PER_RUN, MAX_CHECKPOINT_STEPS = 20, 1000  # where checkpoint_every is None


def train(task: BaseTask, workdir: AnyPath, stop: StopSignal, step_timeout: float | None = None) -> None:
    """Train to the last step, from the newest whole checkpoint in the directory if there is one.

    Args:
        task: with the configuration of the run.
        workdir: for checkpoints, metrics and pictures.
        stop: asks the run to save and leave.
        step_timeout: seconds that a step may take before the process is ended; None: any.

    Raises:
        Preempted: after saving, when asked to leave.
        UserError: if configuration, data and directory do not fit together, a checkpoint cannot be written, or losses
            are not finite for `stop_after_bad_steps` steps.
    """
    config = task.config
    check(config)
    check_installed(config.tracker)
    mesh = make_mesh(config.mesh.fsdp)
    with contextlib.ExitStack() as resources:
        # Data.
        with startup.phase("opening the images"):
            stored = stored_config(workdir)
            if stored and stored.model.method == config.model.method:  # else `open_workdir` raises
                task.resume(stored)
            task.open()
            task.prepare()
            check_same_data(task)
        total_steps, warmup_steps = durations(config, task.num_samples)
        # State: a checkpoint of this run, else the weights that the task names, else new ones.
        with startup.phase("building the model"):
            run = abstract_run(task, mesh)
            checkpoints = open_workdir(task, workdir)
            resources.push(_closing(checkpoints.close))
        with startup.phase("reading the newest checkpoint" if checkpoints.any() else "initialising the parameters"):
            restored = checkpoints.restore(run.state)
            state, data = restored or (initialize(task, run, task.initial_params(run.state.params)), {})
        first_step, samples = int(state.step), int(data.get("samples", 0))
        checkpoint_every = config.checkpoint_every or min(
            MAX_CHECKPOINT_STEPS, share_of_run(None, total_steps, CHECKPOINTS_PER_RUN)
        )
        schedule = Schedule(first_step, warmup_steps, total_steps, checkpoint_every)
        done = broadcast_json(sorted(metric_names(workdir, first_step))) if restored else []  # before a signal ended it
        if first_step > total_steps or (first_step == total_steps and not _missing(task, done)):
            say(f"{workdir} has reached step {first_step} already; set total_steps above that to go on")
            finish(task, workdir, state.eval_params, first_step)
            return
        scores = metric_history(workdir, task.best_metric, first_step)
        stopped = task.stop_reason(scores) if first_step in scores and data.get("total_steps") == total_steps else None
        if stopped:
            say(f"{workdir} has ended at step {first_step} already: {stopped}")
            finish(task, workdir, state.eval_params, first_step)
            return
        describe(task, run, mesh, workdir, schedule, data)
        report = Report(config, workdir, first_step, total_steps, task.num_samples / config.batch_size)
        resources.push(_closing(report.close))
        context = RunContext(run.graph, run.state.params, mesh, workdir, total_steps, report.show, stop.check)
        # The loader reads ahead while the step compiles.
        loader = TrainLoader(
            task.num_samples,
            task.sample_loader(),
            groups=task.groups,
            batch_size=config.batch_size,
            sharding=batch_sharding(mesh),
            seed=config.seed,
            first_sample=samples,
            readers=readers(config, tree_bytes(task.batch())),
        )
        resources.push(_closing(loader.close))
        if (signal := stop.poll()) is not None:  # to one of several processes; there is nothing to save
            raise Preempted(signal, first_step)
        exhaustion = explain_exhaustion(
            config,
            lambda other: compile_changed(task, other, mesh),
            device_bytes(mesh.devices.flat[0]),
            fixed_batch=first_step > 0,
        )
        resources.enter_context(exhaustion)
        with startup.phase("compiling the training step", "; later starts read it from a cache"):
            train_step = build_step(task, run, warmup_steps, total_steps)
            programs = compile_programs(task, train_step, run.state, mesh)
        say(memory_of(programs.values(), mesh))
        hooks = task.hooks(context)
        watchdog = Watchdog(step_timeout)
        resources.callback(watchdog.cancel)

        # Loop. Step N is dispatched before the metrics of step N - 1 are read: the devices never wait for the log.
        number, saved = first_step, first_step or None
        skipped = int(data.get("skipped_images", 0))  # of all processes, up to the last checkpoint
        counted = 0  # of them, those that this process skipped since its start
        clock = Clock()
        pending: tuple[int, dict[str, jax.Array], int] | None = None  # step, metrics, unreadable images up to it

        def read(step: int, metrics: dict[str, jax.Array], own_skipped: int) -> None:
            """Read the metrics of a step, waiting for it; stop on bad ones, report them where due."""
            values = {key: value.item() for key, value in jax.device_get(metrics).items()}
            clock.count(config.batch_size)
            report.advance(step)
            if step == first_step + 1:
                startup.mark("the first step")
                say(startup.summary())
                stop.listen()  # there is a step to save
            if values["bad_steps"] >= config.stop_after_bad_steps:
                raise UserError(
                    f"loss or gradient were not finite in {values['bad_steps']} consecutive steps, up to step {step} "
                    f"(loss {values['loss']}); lower optimizer.base_learning_rate or set optimizer.clip_norm, and "
                    f"start again to continue from the newest checkpoint in {workdir}"
                )
            if step % config.log_every == 0 or step == total_steps:
                rates = clock.rates()
                values |= {"skipped_images": skipped + own_skipped - counted} | rates
                report.training(step, values, config.batch_size / max(rates["images_per_second"], 1e-9))

        def save(step: int, metrics: dict[str, float] | None = None) -> None:
            """Save a checkpoint, with the metrics that make it the best one."""
            nonlocal skipped, counted
            report.flush()  # a run that continues from here finds the metrics up to here
            skipped += sum(all_gather_json(loader.skipped_images - counted))  # of other processes only here
            counted = loader.skipped_images
            position = {"samples": samples, "skipped_images": skipped, **data_of(task), "total_steps": total_steps}
            checkpoints.save(step, state, position, metrics)

        while True:
            signal = stop.poll()
            last = number == total_steps
            due = [hook for hook in hooks if _is_due(hook, number, first_step, last, done)] if signal is None else []
            periodic = number > 0 and (number % checkpoint_every == 0 or last)
            saving = number != saved and (signal is not None or periodic)
            if pending and (due or saving):
                read(*pending)  # evaluate and save only a state whose step was good
                pending = None
            if due or saving or last or signal is not None:
                watchdog.cancel()  # it times training steps only
            # Evaluate.
            try:
                for hook in due:
                    metrics = hook.run(number, state.eval_params)
                    if number > 0 and checkpoints.improves(metrics):
                        save(number, metrics)
                        saved, saving = number, False
                    if metrics:  # after the checkpoint: a run killed in between evaluates again
                        report.evaluation(number, metrics)
                    if task.best_metric and task.best_metric in metrics:
                        scores[number] = metrics[task.best_metric]
            except PreemptionRequested:  # the hook starts again when the run continues here
                signal, saving = stop.received, number not in (0, saved)
            if due and number in scores and not last and (stopped := task.stop_reason(scores)):
                say(f"ending at step {number}: {stopped}")
                last, saving = True, number != saved
            # Save.
            if saving:
                save(number)
                saved = number
            if signal is not None:
                checkpoints.wait()
                raise Preempted(signal, number)
            if last:
                break
            if due or saving:
                clock.restart()
            # Next batch, next step.
            if number == first_step:
                startup.mark("pictures and evaluations before the first step")
            watchdog.arm()
            batch = clock.next(loader)
            if number == first_step:
                startup.mark("the first batch")
            state, metrics_of_step = programs[shapes_of(batch)](state, batch)
            samples += config.batch_size
            number += 1
            if pending:
                read(*pending)
            pending = (number, metrics_of_step, loader.skipped_images)
        checkpoints.wait()
        stop.release()  # everything is saved
        report.finish()
        say(f"finished {number} steps; everything is in {workdir}")
        finish(task, workdir, state.eval_params, number)


def _is_due(hook: Hook, step: int, first_step: int, last: bool, done: list[str]) -> bool:
    """Return whether a hook is called at a step: before the first, after the last, and every so many."""
    again = step == first_step and hook.metric in done
    return bool(hook.every) and (step % hook.every == 0 or last) and not again


def _missing(task: BaseTask, done: list[str]) -> bool:
    """Return whether a metric of the last step is still to be measured: a signal may have come before it."""
    return task.measured_last is not None and task.measured_last not in done


# Before the loop: durations, the directory, the step.


def durations(config: ConfigDict, samples: int) -> tuple[int, int]:
    """Return the steps of the run and of its warm-up.

    Raises:
        UserError: if there are no steps, or more than can be counted.
    """
    total = resolve_steps(config, "total", samples, config.batch_size)
    require(
        total > 0,
        f"total_steps: the run has no steps of batch_size={config.batch_size} images; raise total_steps, "
        "total_examples or total_epochs, or lower batch_size",
    )
    require(
        total * config.batch_size < MAX_SAMPLES,
        f"total_steps: {total} steps of {config.batch_size} images exceed the {MAX_SAMPLES} samples of a run",
    )
    warmup = resolve_steps(config, "optimizer.warmup", samples, config.batch_size)
    if warmup > total:
        say(f"the warm-up of {warmup} steps is cut to the {total} steps of the run")
    return total, min(warmup, total)


def open_workdir(task: BaseTask, workdir: AnyPath) -> Checkpoints:
    """Open the checkpoints of a directory, check that they are of this model, and write configuration and classes.

    Raises:
        UserError: if the directory holds checkpoints of another model, batch size or classes.
        OSError: if it cannot be written.
    """
    config = task.config
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(
        workdir,
        keep=config.checkpoint_keep,
        keep_every=config.checkpoint_keep_every,
        best_metric=task.best_metric,
    )
    config_file, classes_file = workdir / CONFIG_FILE, workdir / CLASSES_FILE
    if checkpoints.any():
        require(
            config_file.is_file(),
            f"{workdir} holds checkpoints but no {CONFIG_FILE} that names their model; choose another --workdir",
        )
        with naming("--workdir"):
            old = read_config(config_file)
        check_same_run(old, config, workdir)
        written = classes_file.is_file()
        names = json.loads(classes_file.read_bytes()) if written else old_class_names(config_file.read_bytes())
        check_same_classes(names, task.class_names, workdir)
    if is_primary():
        if task.class_names:
            write_atomic(classes_file, json.dumps(task.class_names).encode())
        write_atomic(config_file, to_json(config).encode())
    return checkpoints


def check_same_run(old: ConfigDict, new: ConfigDict, workdir: AnyPath) -> None:
    """Check that a run may continue in a directory; print the other changes.

    Raises:
        UserError: if the directory's checkpoints belong to another model or batch size.
    """
    changed = differences(old, new)
    if "batch_size" in changed:
        before, after = changed["batch_size"]
        raise UserError(
            f"batch_size is {before} in {workdir}, {after} here; a run counts its steps in one batch size; set it back "
            "(grad_accum_steps saves memory) or choose another --workdir"
        )
    model_keys = ("image_size", "optimizer.ema_decay", "freeze_encoder")  # of the model or the optimizer's state
    model = {key: values for key, values in changed.items() if key.startswith("model.") or key in model_keys}
    model = {key: values for key, values in model.items() if key == "model.method"} or model  # it explains the others
    if model:
        fields = "; ".join(f"{key} is {before}, not {after}" for key, (before, after) in model.items())
        raise UserError(f"{workdir} holds checkpoints of another model ({fields}); choose another --workdir")
    if changed.pop("init", None):
        say("init has changed, and is not read again: the run continues from its own checkpoint")
    for key, (before, after) in changed.items():
        say(f"continuing with {key} = {after} (was {before})")


def check_same_classes(old: tuple[str, ...], new: tuple[str, ...], workdir: AnyPath) -> None:
    """Check that a run continues with the classes of its checkpoints.

    Raises:
        UserError: naming the classes that differ.
    """
    if old:
        pairs = zip_longest(old, new, fillvalue="none")
        different = [f"{before} is {after} here" for before, after in pairs if before != after]
        require(
            not different,
            f"{workdir} holds a model of other classes ({listing(different)}); choose another --workdir",
        )


def compile_changed(task: BaseTask, config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the training step of a changed configuration."""
    check(config, mesh.size)
    changed = copy.copy(task)
    changed.config = config
    run = abstract_run(changed, mesh)
    return lower_step(build_step(changed, run, 1, 2), run.state, global_batch(changed, mesh), mesh).compile()


def _closing(close: Callable[[], None]) -> Callable[..., None]:
    """Return the callback of an `ExitStack` that closes; after an error it lets no second one hide the first."""

    def on_exit(_kind: object, error: BaseException | None, _traceback: object) -> None:
        with contextlib.suppress(Exception) if error else contextlib.nullcontext():
            close()

    return on_exit


def build_step(task: BaseTask, run: AbstractRun, warmup_steps: int, total_steps: int) -> TrainStep:
    """Build the training step, not yet compiled.

    Raises:
        UserError: if it needs a kernel that the devices cannot run, or the batch does not divide into whole groups.
    """
    config = task.config
    device: Any = next(iter(run.state.step.sharding.device_set))
    check_platform(device, fused=config.fused_attention)
    group = config.grad_accum_steps * task.group_size
    require(
        config.batch_size % group == 0,
        f"batch_size: {config.batch_size} images do not divide into {config.grad_accum_steps} accumulation "
        f"step(s) of whole groups of {task.group_size}, which are mixed; choose a multiple of {group}",
    )

    return make_train_step(
        loss_function(task, run.graph),
        run.optimizer,
        learning_rate_schedule(
            config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
        ),
        grad_accum_steps=config.grad_accum_steps,
        group_size=task.group_size,
        ema_decay=config.optimizer.ema_decay,
        shardings=shardings_of(run.state.params),
    )
