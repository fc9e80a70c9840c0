"""Pre-train by masked image modelling.

    python -m umae_jax.pretrain --config configs/quickstart.py --workdir DIR [--config.KEY=VALUE ...]

The same command again continues from the newest whole checkpoint in DIR.
"""

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import cli, multihost
from umae_jax.config import check, steps_of_epochs
from umae_jax.data.sources import Source, open_source
from umae_jax.data.transforms import first_readable
from umae_jax.errors import require
from umae_jax.files import AnyPath, locate, write_whole
from umae_jax.multihost import StopSignal
from umae_jax.pictures import make_illustrator
from umae_jax.training.evaluation import open_validation
from umae_jax.training.loop import Action
from umae_jax.training.pretraining import make_loss
from umae_jax.training.probes import knn_accuracy, make_reader
from umae_jax.training.runs import Run, describe, initialize
from umae_jax.training.sharding import make_mesh, replicated
from umae_jax.training.step import TrainState
from umae_jax.training.trainer import Task, run_training

PICTURES = "reconstructions"
KNN = "knn_top1"

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
_CLUSTER = multihost.define_flags()


def make_artist(config: ConfigDict, what: Run, mesh: Mesh, source: Source, workdir: AnyPath) -> Action:
    """Draws the first images of the data, always under the same masks."""
    illustrate = make_illustrator(
        what.graph,
        first_readable(source, config.pictures, config.image_size, config.model.channels),
        seed=config.seed,
        mean=config.data.mean,
        std=config.data.std,
        sharding=replicated(mesh),
    )

    def draw(step: int, state: TrainState) -> dict[str, float]:
        picture = illustrate(state.result, f"step {step}")  # all processes compute it
        if jax.process_index() == 0:
            (workdir / PICTURES).mkdir(exist_ok=True)
            write_whole(workdir / PICTURES / f"{step:07}.png", picture)
        return {}

    return Action(config.picture_every, draw)


def make_prober(
    config: ConfigDict, what: Run, mesh: Mesh, training: Source, validation: Source, stop: StopSignal
) -> Action:
    """Measures what the nearest neighbours of frozen features tell of the validation images' classes."""
    batch_size = config.batch_size // config.grad_accum_steps
    read = make_reader(config, what.graph, what.state.params, mesh, batch_size, stop.check)
    options = {"neighbors": config.probe.neighbors, "temperature": config.probe.temperature}

    def measure(_step: int, state: TrainState) -> dict[str, float]:
        bank = read(state.result, training, "data.source", config.probe.images)
        queries = read(state.result, validation, "validation.source")
        measured: dict[str, float] = {KNN: knn_accuracy(bank, queries, classes=len(training.classes), **options)}
        unreadable = bank.unreadable + queries.unreadable
        return measured | ({"knn_unreadable": unreadable} if unreadable else {})

    every = steps_of_epochs(config.validation.every_epochs, len(training), config.batch_size)
    return Action(every, measure, metric=KNN)


def main() -> None:
    """Pre-train, or continue."""
    config = cli.read_config(_CONFIG)
    workdir = locate(cli.required(_WORKDIR, "a directory for what the run produces"), "--workdir")
    cli.join(_CLUSTER, config, workdir)  # before signals are remembered: waiting for others needs no saving
    with StopSignal() as stop:
        check(config)
        require(
            config.model.method != "classifier",
            "model.method: a classifier is not pre-trained; choose um_mae, or train it by python -m umae_jax.finetune",
        )
        require(
            config.init is None,
            "init: pre-training begins from scratch; to go on from weights, make a directory of them by "
            "python -m umae_jax.convert FILE --workdir DIR, and continue there",
        )
        mesh = make_mesh(config.mesh.fsdp)
        what = describe(config, mesh)
        source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
        validation = open_validation(config, source)

        def actions(_first_step: int) -> list[Action]:
            made = [make_artist(config, what, mesh, source, workdir)] if config.picture_every else []
            return made + ([make_prober(config, what, mesh, source, validation, stop)] if validation else [])

        measured = (KNN,) if validation and config.validation.every_epochs else ()
        task = Task(what, source, make_loss(config, what.graph), lambda: initialize(config, what), actions, measured)
        run_training(config, workdir, mesh, task, stop, _CLUSTER.step_timeout.value)
        if pictures := sorted((workdir / PICTURES).glob("*.png")):
            cli.result(pictures[-1])


if __name__ == "__main__":
    cli.run(main)
