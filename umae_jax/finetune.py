"""Fine-tune a pre-trained encoder as a classifier.

    python -m umae_jax.finetune --config configs/finetune_swin_tiny.py --workdir DIR --config.init=DIR_OR_FILE

`init` is the directory of a run or a file of weights, as for `umae_jax.load_encoder`; without it the model is trained
from scratch. The same command again continues from the newest whole checkpoint in DIR.
"""

import contextlib

from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import cli, multihost
from umae_jax.config import check, steps_of_epochs
from umae_jax.data.sources import Source, open_source
from umae_jax.errors import require
from umae_jax.features import read_encoder
from umae_jax.files import AnyPath, locate
from umae_jax.multihost import StopSignal, broadcast_json
from umae_jax.training.checkpoint import BEST, Checkpoints, newest_step
from umae_jax.training.evaluation import make_evaluator, open_validation
from umae_jax.training.finetuning import adapt_pretrained, make_loss, name_classes
from umae_jax.training.loop import Action
from umae_jax.training.runs import Run, describe, initialize
from umae_jax.training.sharding import make_mesh
from umae_jax.training.step import TrainState
from umae_jax.training.trainer import MAX_SAMPLES, Task, run_training

TOP1 = "validation_top1"

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
_CLUSTER = multihost.define_flags()


def begin(config: ConfigDict, what: Run) -> TrainState:
    """The first state: a new model, with the encoder that the configuration names."""
    if config.init is None:
        cli.say("init is not set: training from scratch")
        return initialize(config, what)
    pretrained, encoder = read_encoder(config.init, "init")
    wanted = what.state.params["encoder"]
    return initialize(config, what, adapt_pretrained(config, wanted, pretrained, encoder, config.init))


def make_validation(
    config: ConfigDict,
    what: Run,
    mesh: Mesh,
    training: Source,
    source: Source,
    workdir: AnyPath,
    best: Checkpoints,
    stop: StopSignal,
) -> Action:
    """Measures accuracy, and keeps the checkpoint that did best."""
    highest = broadcast_json(best.note(TOP1)) or 0.0
    batch_size = config.batch_size // config.grad_accum_steps
    evaluate = make_evaluator(config, what.graph, what.state.params, source, mesh, batch_size, stop.check)

    def validate(step: int, state: TrainState) -> dict[str, float]:
        nonlocal highest
        accuracy = evaluate(state.result)
        if step > 0 and accuracy.top1 > highest:
            highest = accuracy.top1
            best.save(step, state, step * config.batch_size, **{TOP1: highest})
            best.wait()  # the metric that says it is there comes after it
            # If the run is killed it goes on from its newest checkpoint, and needs the best one up to there.
            best.forget(after=step, before=broadcast_json(newest_step(workdir)))
        measured = {TOP1: accuracy.top1, "validation_top5": accuracy.top5, "validation_images": accuracy.images}
        return measured | ({"validation_unreadable": accuracy.unreadable} if accuracy.unreadable else {})

    every = steps_of_epochs(config.validation.every_epochs, len(training), config.batch_size)
    return Action(every, validate, metric=TOP1)


def main() -> None:
    """Fine-tune, or continue."""
    config = cli.read_config(_CONFIG)
    workdir = locate(cli.required(_WORKDIR, "a directory for what the run produces"), "--workdir")
    cli.join(_CLUSTER, config, workdir)  # before signals are remembered: waiting for others needs no saving
    with StopSignal() as stop, contextlib.ExitStack() as resources:
        check(config)
        require(
            config.model.method == "classifier",
            f'model.method is {config.model.method}; fine-tuning starts from default_config(SIZE, "classifier"), as '
            "configs/finetune_swin_tiny.py does",
        )
        require(
            not (config.augment.mixup or config.augment.cutmix)
            or config.batch_size // config.grad_accum_steps % 2 == 0,
            f"batch_size: mixup and cutmix take images in pairs, and {config.batch_size} in {config.grad_accum_steps} "
            "accumulated part(s) leaves odd ones; choose an even number a part",
        )
        source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
        name_classes(config, source)
        validation = open_validation(config, source)
        mesh = make_mesh(config.mesh.fsdp)
        what = describe(config, mesh)

        def actions(first_step: int) -> list[Action]:
            if validation is None:
                cli.say("validation.source is not set: accuracy is not measured")
                return []
            best = Checkpoints(workdir, folder=BEST, keep=None)
            resources.callback(best.close)
            best.forget(after=first_step, before=first_step)  # later ones will be made again
            return [make_validation(config, what, mesh, source, validation, workdir, best, stop)]

        measured = (TOP1,) if validation and config.validation.every_epochs else ()
        task = Task(what, source, make_loss(config, what.graph), lambda: begin(config, what), actions, measured)
        run_training(config, workdir, mesh, task, stop, _CLUSTER.step_timeout.value)
    if broadcast_json((workdir / BEST).is_dir()):
        best = Checkpoints(workdir, folder=BEST, keep=None)
        best.forget(after=MAX_SAMPLES, before=MAX_SAMPLES)  # nothing is left that might be continued
        highest = best.note(TOP1)
        best.close()
        if highest is not None:
            cli.result(f"best top-1 {highest:.2%}, in {workdir / BEST}")


if __name__ == "__main__":
    cli.run(main)
