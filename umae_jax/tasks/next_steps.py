"""Commands to go on with after a run, each by its purpose."""

import json
import shlex

from ml_collections import ConfigDict

from umae_jax.config import bundled_configs, flat, load_config
from umae_jax.files import AnyPath, in_bucket
from umae_jax.weights.encoder_file import ENCODER_FILE

TRAIN, VALIDATION = "folder:TRAIN", "folder:VALIDATION"  # one subfolder per class
LABELLED = "TRAIN and VALIDATION: folders with one subfolder per class"


def after_pretraining(config: ConfigDict, workdir: AnyPath) -> dict[str, str]:
    """Return commands that use a pre-trained model."""
    labelled = config.validation.source is not None
    replace = () if labelled else ("--source", TRAIN, "--validation", VALIDATION)
    note = "" if labelled else f"; {LABELLED}"
    return {
        f"look at the pictures in {workdir}, or at other images": _command(
            "visualize", "--workdir", workdir, "--images", _images(config), "--output", _beside(workdir, "other.png")
        ),
        f"measure the features{note}": _command("evaluate", "--workdir", workdir, "--probe", "knn", *replace),
        f"fine-tune{note}": _finetune(config, workdir),
        **_weights(workdir),
    }


def after_finetuning(config: ConfigDict, workdir: AnyPath) -> dict[str, str]:
    """Return commands that use a classifier."""
    labelled = config.validation.source is not None or config.validation.fraction > 0
    validated = labelled and config.validation.every_epochs > 0
    best = ("--best",) if validated else ()
    replace = () if labelled else ("--validation", VALIDATION)
    table = ("--output", _beside(workdir, "classes.csv"))
    return {
        "measure the accuracy": _command("evaluate", "--workdir", workdir, *best, *replace),
        "classify images": _command("evaluate", "--workdir", workdir, *best, "--images", "IMAGES", *table),
        **_weights(workdir, *best),
    }


def after_detection(config: ConfigDict, workdir: AnyPath) -> dict[str, str]:
    """Return commands that use a detector."""
    validated = config.validation.source is not None and config.validation.every_epochs > 0
    best = ("--best",) if validated else ()
    replace = () if config.validation.source is not None else ("--validation", "coco:ANNOTATIONS.json@IMAGES")
    return {
        "measure AP": _command("evaluate", "--workdir", workdir, *best, *replace),
        "draw the objects of other images": _command("evaluate", "--workdir", workdir, *best, "--images", "IMAGES"),
        **_weights(workdir, *best),
    }


def _weights(workdir: AnyPath, *options: str) -> dict[str, str]:
    """Return what to do with the weights."""
    output = _beside(workdir, "export/model.safetensors")
    encoder = json.dumps(str(workdir / ENCODER_FILE))
    return {
        "export the whole model, also for PyTorch": _command("convert", workdir, "--output", output, *options),
        "load the encoder of the last step in Python": f"encoder = umae_jax.load_encoder({encoder})",
    }


def _finetune(config: ConfigDict, workdir: AnyPath) -> str:
    """Return the command that fine-tunes a pre-trained encoder, by the bundled configuration that fits it best."""
    changes: dict[str, dict[str, object]] = {}
    for name in bundled_configs():
        if name.startswith("finetune_") and (target := load_config(name)).model.encoder == config.model.encoder:
            changes[name] = _changes(target, config)
    name = min(changes, key=lambda name: len(changes[name]))
    if config.validation.source is None:
        changes[name] |= {"data.source": TRAIN, "validation.source": VALIDATION}
    target = workdir.with_name(f"{workdir.name}_finetuned")
    overrides = (f"--config.{key}={value}" for key, value in changes[name].items())
    return _command("finetune", "--config", name, "--workdir", target, f"--config.init={workdir}", *overrides)


def _changes(target: ConfigDict, pretrained: ConfigDict) -> dict[str, object]:
    """Return the keys of a fine-tuning that must change to fit the model and the labelled data of a pre-training."""
    theirs, ours = flat(pretrained), flat(target)
    keys = [key for key in ours if key.startswith("model.") and key != "model.method"]
    keys += ["image_size", "data.mean", "data.std"]
    if pretrained.validation.source is not None:
        keys += ["data.source", "data.split", "data.data_dir", "validation.source", "validation.split"]
    return {key: theirs[key] for key in keys if key in theirs and theirs[key] != ours[key]}


def _images(config: ConfigDict) -> str:
    """Return the folder of the training images, or a name to replace."""
    kind, _, path = config.data.source.partition(":")
    return path if kind == "folder" else "IMAGES"


def _beside(workdir: AnyPath, name: str) -> str:
    """Return a path in the run's directory, or for a bucket in the current one: some commands write no buckets."""
    return name if in_bucket(workdir) else str(workdir / name)


def _command(module: str, *arguments: object) -> str:
    """Return a command line to paste."""
    return f"python -m umae_jax.{module} {shlex.join(map(str, arguments))}"
