"""The Python API, exported by `import umae_jax`: the commands as functions, with the same configurations."""

import copy
import os
from typing import Any, Literal

from ml_collections import ConfigDict

from umae_jax.config import ENCODERS, default_config, load_config, methods_of
from umae_jax.errors import naming, require
from umae_jax.files import locate

__all__ = ["default_config", "detect", "evaluate", "finetune", "list_models", "pretrain"]

_Path = str | os.PathLike[str]


def list_models() -> dict[str, tuple[str, ...]]:
    """Return the name of every preset size with the methods that can train it: arguments of `default_config`."""
    return {size: methods_of(size) for encoder in ENCODERS.values() for size in encoder.sizes}


def pretrain(config: ConfigDict | _Path, workdir: _Path) -> None:
    """Pre-train a masked model, or continue the run in `workdir`.

    Args:
        config: a configuration, the path of a file such as those in configs/, or the name of a bundled one.
        workdir: directory of the run, on this machine or in a bucket: checkpoints, metrics and pictures.

    Raises:
        UserError: naming the key of the configuration that is wrong.
        Preempted: after saving, on SIGTERM or SIGINT (the stop button of a notebook) once a step is done; before that
            SIGINT raises KeyboardInterrupt, and nothing is saved.
    """
    _train("pretrain", config, workdir)


def finetune(config: ConfigDict | _Path, workdir: _Path) -> None:
    """Fine-tune a classifier on pre-trained weights, `config.init`, or continue the run in `workdir`.

    Arguments and errors are those of `pretrain`.
    """
    _train("finetune", config, workdir)


def detect(config: ConfigDict | _Path, workdir: _Path) -> None:
    """Train a detector on annotated images, from pre-trained weights, `config.init`, or continue the run in `workdir`.

    Arguments and errors are those of `pretrain`.
    """
    _train("detect", config, workdir)


def _train(command: str, config: ConfigDict | _Path, workdir: _Path) -> None:
    from umae_jax import startup  # imported here: loading an encoder needs no training code
    from umae_jax.tasks.command import train

    startup.restart()
    with naming("config"):
        config = copy.deepcopy(load_config(config))
    train(config, locate(workdir, "workdir"), command)


def evaluate(
    workdir: _Path,
    *,
    probe: Literal["knn", "linear"] | None = None,
    best: bool = False,
    validation: str | None = None,
    source: str | None = None,
    stage: int | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Measure the accuracy of a classifier, or of a probe on frozen features.

    Args:
        workdir: directory of a run.
        probe: kind of probe; None: evaluate the classifier itself.
        best: evaluate the best checkpoint, not the newest.
        validation: labelled images to measure on, "folder:PATH" or "tfds:NAME"; None: those of the run.
        source: labelled training images of the probe; None: those of the run.
        stage: stage to probe, from 0, or -1 for the last; None: the stage in the run's configuration.
        batch_size: images per batch, over all devices.

    Returns:
        The metrics by name, such as "top1", and the "step" of the checkpoint.

    Raises:
        UserError: if there is no such run, or its data cannot be read.
    """
    from umae_jax.tasks import evaluation

    require(
        probe is not None or (source is None and stage is None),
        "source and stage belong to a probe; set probe, or omit them",
    )
    path = locate(workdir, "workdir")
    run = evaluation.open_run(path, best=best, source=source, validation=validation, stage=stage)
    return evaluation.evaluate_run(run, probe=probe, batch_size=batch_size)[1]
