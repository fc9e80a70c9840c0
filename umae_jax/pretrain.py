"""Pre-train by masked image modelling.

    python -m umae_jax.pretrain --config configs/quickstart.py --workdir DIR [--config.KEY=VALUE ...]

The same command again continues from the newest whole checkpoint in DIR.
"""

import sys
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from umae_jax import cli
from umae_jax.config import CONFIG_FILE, check, differences, from_json, resolve_steps, to_json
from umae_jax.data.loader import Loader
from umae_jax.data.sources import open_source
from umae_jax.data.transforms import first_readable
from umae_jax.errors import UserError, require
from umae_jax.pictures import make_illustrator
from umae_jax.training import pretraining
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.loop import Action, train
from umae_jax.training.mesh import batch_sharding, make_mesh
from umae_jax.training.metrics import duration, write_whole
from umae_jax.training.optimizer import learning_rate_schedule
from umae_jax.training.step import TrainState, compile_step, make_train_step

PICTURES = "reconstructions"
MOST_SAMPLES = 2**32  # sample indices are 32-bit

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")


def say(line: str) -> None:
    """Tell the user something on the terminal."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal


def check_same_model(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Check that a run may continue in a directory; say what else has changed.

    Raises:
        UserError: if the directory's checkpoints belong to another model.
    """
    changed = differences(old, new)
    model = {key: values for key, values in changed.items() if key.startswith("model.") or key == "image_size"}
    if model:
        fields = "; ".join(f"{key} is {before} there, {after} here" for key, (before, after) in model.items())
        raise UserError(f"{workdir} holds checkpoints of another model ({fields}); choose another --workdir")
    for key, (before, after) in changed.items():
        say(f"continuing with {key} = {after} (was {before})")


def main() -> None:
    """Pre-train, or continue."""
    config = cli.required(_CONFIG, "a file such as configs/quickstart.py")
    workdir = Path(cli.required(_WORKDIR, "a directory for what the run produces")).expanduser()
    check(config)
    mesh = make_mesh(config.mesh.fsdp)
    what = pretraining.describe(config, mesh)
    source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    total_steps = resolve_steps(config, "total", len(source), config.batch_size)
    warmup_steps = resolve_steps(config.optimizer, "warmup", len(source), config.batch_size)
    require(total_steps > 0, "total_steps: the run has no steps; set total_steps, total_examples or total_epochs")
    require(
        total_steps * config.batch_size < MOST_SAMPLES,
        f"total_steps: {total_steps} steps of {config.batch_size} images are more than a run can count, {MOST_SAMPLES}",
    )

    # Resume if there is a checkpoint, else start from scratch.
    (workdir / PICTURES).mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint_keep, keep_every=config.checkpoint_keep_every)
    config_file = workdir / CONFIG_FILE
    if checkpoints.any() and config_file.is_file():
        check_same_model(from_json(config_file.read_text()), config, workdir)
    write_whole(config_file, to_json(config).encode())
    restored = checkpoints.restore(what.state)
    if restored is None:
        state, samples = pretraining.initialize(config, what), 0
    else:
        state, samples = restored
    first_step = int(state.step)

    parameters = sum(array.size for array in jax.tree.leaves(state.params))
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    say(f"{parameters:,} parameters, {len(source):,} images, {devices}")
    if first_step:
        say(f"continuing at step {first_step} of {total_steps}")
    illustrate = make_illustrator(
        what.graph,
        first_readable(source, max(1, config.pictures), config.image_size, config.model.channels),
        seed=config.seed,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
    )

    def draw(step: int, state: TrainState) -> dict[str, float]:
        write_whole(workdir / PICTURES / f"{step:07}.png", illustrate(state.params, f"step {step}"))
        return {}

    if first_step < total_steps:
        loader = Loader(
            source,
            batch_size=config.batch_size,
            sharding=batch_sharding(mesh),
            seed=config.seed,
            first_sample=samples,
            size=config.image_size,
            channels=config.model.channels,
            area=config.data.area,
            threads=config.data.threads,
            workers=config.data.workers,
        )
        start = time.monotonic()
        schedule = learning_rate_schedule(
            config.optimizer, batch_size=config.batch_size, warmup_steps=warmup_steps, total_steps=total_steps
        )
        loss = pretraining.make_loss(config, what.graph)
        step = make_train_step(loss, what.optimizer, schedule, accumulate=config.accumulate)
        compiled = compile_step(step, what.state, pretraining.abstract_batch(config, mesh), mesh)
        say(f"compiled the step in {duration(time.monotonic() - start)}")
        state = train(
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
            workdir=workdir,
            actions=[Action(config.picture_every, draw)],
        )
        loader.close()
    checkpoints.close()
    say(f"finished {total_steps} steps; everything is in {workdir}")
    if config.picture_every:
        print(workdir / PICTURES / f"{total_steps:07}.png")  # noqa: T201 - the result, on standard output


if __name__ == "__main__":
    cli.run(main)
