"""Pre-train by masked image modelling.

    python -m umae_jax.pretrain --config configs/quickstart.py --workdir DIR [--config.KEY=VALUE ...]

The same command again continues from the newest whole checkpoint in DIR.
"""

import contextlib
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from umae_jax import cli
from umae_jax.config import CONFIG_FILE, check, differences, read_config, resolve_steps, to_json
from umae_jax.data.loader import Loader
from umae_jax.data.sources import Source, open_source
from umae_jax.data.transforms import first_readable
from umae_jax.errors import UserError, require
from umae_jax.files import write_whole
from umae_jax.pictures import make_illustrator
from umae_jax.signals import StopSignals
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.loop import Action, train
from umae_jax.training.mesh import batch_sharding, make_mesh
from umae_jax.training.metrics import duration
from umae_jax.training.optimizer import learning_rate_schedule
from umae_jax.training.pretraining import abstract_batch, make_loss
from umae_jax.training.runs import Run, describe, initialize
from umae_jax.training.step import TrainState, compile_step, make_train_step

PICTURES = "reconstructions"
MOST_SAMPLES = 2**32  # sample indices are 32-bit

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")


def durations(config: ConfigDict, images: int) -> tuple[int, int]:
    """The run's length and its warm-up, in steps.

    Raises:
        UserError: if there is nothing to do, or more than can be counted.
    """
    total = resolve_steps(config, "total", images, config.batch_size)
    require(total > 0, "total_steps: the run has no steps; set total_steps, total_examples or total_epochs")
    require(
        total * config.batch_size < MOST_SAMPLES,
        f"total_steps: {total} steps of {config.batch_size} images are more than a run can count, {MOST_SAMPLES}",
    )
    warmup = resolve_steps(config, "optimizer.warmup", images, config.batch_size)
    if warmup > total:
        cli.say(f"the warm-up of {warmup} steps is cut to the {total} of the run")
    return total, min(warmup, total)


def check_same_model(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Check that a run may continue in a directory; say what else has changed.

    Raises:
        UserError: if the directory's checkpoints belong to another model or batch size.
    """
    changed = differences(old, new)
    if "batch_size" in changed:
        before, after = changed["batch_size"]
        raise UserError(
            f"batch_size is {before} in {workdir}, {after} here, and a run keeps the one its steps are counted in; "
            "set it back (accumulate computes it in parts, to save memory) or choose another --workdir"
        )
    model = {key: values for key, values in changed.items() if key.startswith("model.") or key == "image_size"}
    if model:
        fields = "; ".join(f"{key} is {before} there, {after} here" for key, (before, after) in model.items())
        raise UserError(f"{workdir} holds checkpoints of another model ({fields}); choose another --workdir")
    for key, (before, after) in changed.items():
        cli.say(f"continuing with {key} = {after} (was {before})")


def open_workdir(config: ConfigDict, workdir: Path) -> Checkpoints:
    """Make the directory this run's, and open its checkpoints.

    Raises:
        UserError: if it holds those of another model.
        OSError: if it cannot be written.
    """
    (workdir / PICTURES).mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every)
    config_file = workdir / CONFIG_FILE
    if checkpoints.any():
        require(
            config_file.is_file(),
            f"{workdir} holds checkpoints but no {CONFIG_FILE} to say of which model; choose another --workdir",
        )
        check_same_model(read_config(config_file), config, workdir)
    write_whole(config_file, to_json(config).encode())
    return checkpoints


def make_artist(config: ConfigDict, what: Run, source: Source, workdir: Path) -> Action:
    """Draws the first images of the data, always under the same masks."""
    illustrate = make_illustrator(
        what.graph,
        first_readable(source, config.pictures, config.image_size, config.model.channels),
        seed=config.seed,
        mean=config.data.mean,
        std=config.data.std,
    )

    def draw(step: int, state: TrainState) -> dict[str, float]:
        write_whole(workdir / PICTURES / f"{step:07}.png", illustrate(state.params, f"step {step}"))
        return {}

    return Action(config.picture_every, draw)


def main() -> None:
    """Pre-train, or continue."""
    with StopSignals() as signals, contextlib.ExitStack() as resources:
        config = cli.read_config(_CONFIG)
        workdir = Path(cli.required(_WORKDIR, "a directory for what the run produces")).expanduser()
        check(config)
        require(config.model.method != "classifier", "model.method: a classifier is not pre-trained; choose um_mae")
        mesh = make_mesh(config.mesh.fsdp)
        what = describe(config, mesh)
        source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
        total_steps, warmup_steps = durations(config, len(source))
        checkpoints = open_workdir(config, workdir)
        resources.callback(checkpoints.close)

        # Resume if there is a checkpoint, else start from scratch.
        restored = checkpoints.restore(what.state)
        state, samples = restored or (initialize(config, what), 0)
        first_step = int(state.step)
        parameters = sum(array.size for array in jax.tree.leaves(state.params))
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
        cli.say(f"{parameters:,} parameters, {len(source):,} images, {devices}")
        if first_step >= total_steps:
            cli.say(f"{workdir} has reached step {first_step} already; set total_steps above that to go on")
        else:
            if first_step:
                cli.say(f"continuing at step {first_step} of {total_steps}")
            # The loader reads ahead while the step compiles.
            loader = Loader.of(config, source, batch_sharding(mesh), first_sample=samples)
            resources.callback(loader.close)
            schedule = learning_rate_schedule(
                config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
            )
            loss = make_loss(config, what.graph)
            step = make_train_step(loss, what.optimizer, schedule, accumulate=config.accumulate)
            start = time.monotonic()
            compiled = compile_step(step, what.state, abstract_batch(config, mesh), mesh)
            cli.say(f"compiled the step in {duration(time.monotonic() - start)}")
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
                signals=signals,
                workdir=workdir,
                actions=[make_artist(config, what, source, workdir)] if config.picture_every else [],
            )
            cli.say(f"finished {total_steps} steps; everything is in {workdir}")
        if pictures := sorted((workdir / PICTURES).glob("*.png")):
            print(pictures[-1])  # noqa: T201 - the result, on standard output


if __name__ == "__main__":
    cli.run(main)
