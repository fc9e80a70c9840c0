"""The table of a run before its first step, and warnings where its settings do not fit together."""

import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.config import size_of
from umae_jax.console import say, size, warn
from umae_jax.errors import require
from umae_jax.files import AnyPath, in_bucket
from umae_jax.multihost import all_gather_json
from umae_jax.training.memory import tree_bytes
from umae_jax.training.optimizer import learning_rate_schedule
from umae_jax.training.state import AbstractRun
from umae_jax.training.task import BaseTask
from umae_jax.weights.stored_run import FOLDER, checkpoints_in

FEW_STEPS = 2000  # pre-training and fine-tuning from scratch learn little in fewer


class Schedule(NamedTuple):
    """Durations of a run, in steps."""

    first_step: int  # that this process starts from
    warmup: int
    total: int
    checkpoint_every: int


class _Disk(NamedTuple):
    """Space for checkpoints."""

    phrase: str  # for the table
    needed: int  # bytes that this run will add
    free: int | None  # bytes; None in a bucket


def data_of(task: BaseTask) -> dict[str, Any]:
    """Return what a checkpoint records of the data, for a run that continues."""
    return {"images": task.num_samples, "images_digest": task.data_digest}


def check_same_data(task: BaseTask) -> None:
    """Check that all processes see the same training images.

    Raises:
        UserError: in every process, naming one that sees others.
    """
    seen = all_gather_json([task.num_samples, task.data_digest, list(task.class_names)])
    for process, (images, *names) in enumerate(seen):
        require(
            [images, *names] == seen[0],
            f"data.source: process {process} sees {images:,} images, process 0 {seen[0][0]:,}, or others; let all "
            "processes read the same files",
        )


def describe(
    task: BaseTask, run: AbstractRun, mesh: Mesh, workdir: AnyPath, schedule: Schedule, data: dict[str, Any]
) -> None:
    """Print the table of the run, its warnings, and what has changed since the checkpoint that it continues from."""
    disk = _disk(task, run, workdir, schedule)
    say(f"This run:\n{_table(task, run, mesh, workdir, schedule, disk)}")
    for line in _warnings(task, mesh, workdir, schedule, disk):
        warn(line)
    if schedule.first_step:
        say(f"continuing at step {schedule.first_step} of {schedule.total}")
    before, now = data.get("images"), data_of(task)
    if before not in (None, task.num_samples):
        warn(f"data.source: {task.num_samples:,} images, but {before:,} when the checkpoint was written")
    elif data.get("images_digest", "") not in ("", now["images_digest"]):
        warn("data.source: as many images as when the checkpoint was written, but with other names")
    if data.get("total_steps") not in (None, schedule.total):
        step, old = schedule.first_step, schedule._replace(total=data["total_steps"])
        rate, old_rate = (f"{_learning_rate(task, lengths, step):.3g}" for lengths in (schedule, old))
        effect = f"continues at {rate}, not {old_rate}" if rate != old_rate else f"continues at {rate} on another curve"
        warn(
            f"total_steps: the schedule has {schedule.total:,} steps, but had {old.total:,}; the learning rate {effect}"
        )


def _table(task: BaseTask, run: AbstractRun, mesh: Mesh, workdir: AnyPath, schedule: Schedule, disk: _Disk) -> str:
    """Return the table of a run: a row per setting that the configuration, the data and the devices decide."""
    config, images = task.config, task.num_samples
    (height, width), channels = config.image_size, config.model.channels
    kind = mesh.devices.flat[0].device_kind
    steps_per_epoch = images / config.batch_size
    per_device = config.batch_size // mesh.size
    parts = "" if config.grad_accum_steps == 1 else f", in {config.grad_accum_steps} parts"
    epochs = schedule.total / steps_per_epoch
    peak = _learning_rate(task, schedule, schedule.warmup)
    rows = {
        "model": f"{size_of(config)}, {config.model.method}; {_parameters(run):,} parameters",
        "images": f"{images:,} in {config.data.source}",
        "image size": f"{height} x {width} pixels, {channels} channel{'s'[: channels > 1]}",
        **task.overview(),
        "dtype": config.dtype,
        "batch": f"{config.batch_size:,} images, {per_device:,} per device{parts}",
        "schedule": f"{schedule.total:,} steps = {epochs:,.4g} epochs of {steps_per_epoch:,.4g} steps",
        "learning rate": f"warm-up of {schedule.warmup:,} steps to {peak:.3g}, then {_decay(config)}",
        "devices": f"{mesh.size} {kind}" + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "checkpoints": f"every {schedule.checkpoint_every:,} steps, {disk.phrase}",
        "directory": str(workdir),
    }
    longest = max(map(len, rows))
    return "\n".join(f"  {name:{longest}}  {value}" for name, value in rows.items())


def _warnings(task: BaseTask, mesh: Mesh, workdir: AnyPath, schedule: Schedule, disk: _Disk) -> Iterator[str]:
    """Yield a line for each pair of settings that do not fit together."""
    config = task.config
    images = len(task.groups.of_record) if task.groups else task.num_samples
    if config.batch_size > images:
        yield (
            f"batch_size: {config.batch_size} images are more than the {images} of the data; "
            "every step repeats some of them"
        )
    if schedule.total < FEW_STEPS and config.init is None and not schedule.first_step:
        yield (
            f"total_steps: {schedule.total} steps are few; a model learns little in fewer than {FEW_STEPS:,}: "
            f"raise {_length_key(config)}, or lower batch_size"
        )
    if config.dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu":
        yield "dtype: bfloat16 is slow on CPUs; write --config.dtype=float32"
    if disk.free is not None and disk.needed > disk.free:
        yield (
            f"checkpoint_keep: the checkpoints need {size(disk.needed)}, {size(disk.free)} are free in {workdir}; "
            "lower checkpoint_keep, raise checkpoint_keep_every, or make room"
        )


def _length_key(config: ConfigDict) -> str:
    """Return the key that sets the length of the run."""
    keys = ("total_steps", "total_examples", "total_epochs")
    return next(key for key in keys if config[key] is not None)


def _decay(config: ConfigDict) -> str:
    """Return the decay of the learning rate as a phrase."""
    parts = config.optimizer.get("decay_at", None)
    return f"a tenth after {', '.join(f'{part:.1%}' for part in parts)}" if parts else "cosine decay"


def _parameters(run: AbstractRun) -> int:
    """Return the number of the model's parameters."""
    return sum(array.size for array in jax.tree.leaves(run.state.params))


def _learning_rate(task: BaseTask, schedule: Schedule, step: int) -> float:
    """Return the learning rate of a step."""
    rate = learning_rate_schedule(
        task.config.optimizer,
        batch_size=task.config.batch_size,
        warmup_steps=schedule.warmup,
        total_steps=schedule.total,
    )
    return float(rate(jnp.float32(step)))


def _disk(task: BaseTask, run: AbstractRun, workdir: AnyPath, schedule: Schedule) -> _Disk:
    """Count the bytes that the checkpoints of this run need."""
    config, each = task.config, tree_bytes(run.state)
    every = config.checkpoint_keep_every
    kept = config.checkpoint_keep + (schedule.total // every if every else 0) + (task.best_metric is not None)
    kept = min(kept, -(-schedule.total // schedule.checkpoint_every)) + 1  # one more while it is written
    added = max(0, kept - len(checkpoints_in(workdir / FOLDER))) * each
    phrase = f"{size(each)} each, {size(kept * each)} in all"
    if in_bucket(workdir):
        return _Disk(phrase, added, None)
    free = shutil.disk_usage(workdir).free
    return _Disk(f"{phrase}, {size(free)} free", added, free)
