"""Whole runs from files of weights, and files of weights from whole runs."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

import umae_jax
from umae_jax import export
from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.errors import UserError, require
from umae_jax.files import AnyPath, write_together, write_whole
from umae_jax.training.checkpoint import FOLDER, Checkpoints
from umae_jax.training.runs import describe, read_run, start_from
from umae_jax.training.sharding import make_mesh
from umae_jax.weights.card import OURS, model_card
from umae_jax.weights.files import Weights, check_output, encode_weights
from umae_jax.weights.huggingface import TRANSFORMERS_FILE, WRITER, model_config, preprocessor_config, to_huggingface
from umae_jax.weights.names import from_reference, to_reference
from umae_jax.weights.recognize import read_model

REFERENCE = "reference"
INCOMING = ".incoming"  # where a run is made of a file, in its directory
BACKBONE = Path(export.__file__).with_name("umae_backbone.py")


def import_weights(file: AnyPath, workdir: Path, config: ConfigDict | None = None) -> ConfigDict:
    """Make a run's directory, at step 0, of a file of weights; whole or not at all.

    Args:
        file: the weights.
        workdir: the directory, empty or not yet there.
        config: the model, if it is not to be told from the file.

    Returns:
        The run's configuration.

    Raises:
        UserError: if the file is not what it should be, or the directory holds a run.
    """
    workdir = workdir.absolute()
    part = workdir / INCOMING
    require(
        not workdir.exists() or (workdir.is_dir() and not set(workdir.iterdir()) - {part}),
        f"--workdir: {workdir} is there and not empty; choose another, so that nothing is lost",
    )
    config, tensors = read_model(file, config)
    run = describe(config, make_mesh())
    params = from_reference(config, run.state.params, tensors, name=str(file))
    was_there = workdir.exists()
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir(parents=True)
    try:
        checkpoints = Checkpoints(part)
        try:
            checkpoints.save(0, start_from(run, params), samples=0)
            checkpoints.wait()
        finally:
            with contextlib.suppress(Exception):  # has been told
                checkpoints.close()
        write_whole(part / CONFIG_FILE, to_json(config).encode())
        for name in (FOLDER, CONFIG_FILE):  # with which the directory becomes a run's
            (part / name).replace(workdir / name)
    except BaseException as error:
        _remove(part if was_there else workdir)
        if isinstance(error, UserError):
            raise UserError(f"--workdir: {workdir} could not be written; make room or choose another") from error
        raise
    part.rmdir()
    return config


def _remove(folder: Path) -> None:
    """Remove a folder into which Orbax, after a failure, writes on for some moments the arrays that did not fail."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _shareable(config: ConfigDict) -> ConfigDict:
    """A configuration without the paths of this machine."""
    config = config.copy_and_resolve_references()
    kind, _, place = config.data.source.partition(":")
    config.data.source = f"{kind}:{Path(place).name}" if place else kind
    config.data.data_dir = config.init = config.validation.source = None
    return config


def export_weights(workdir: AnyPath, output: Path, layout: str = REFERENCE, *, best: bool = False) -> list[Path]:
    """Write a file of weights, and what belongs beside it, of a run's newest checkpoint.

    Args:
        workdir: of the run.
        output: the file, .safetensors or .pth.
        layout: whose names, "reference" or one of `huggingface.LAYOUTS`.
        best: take the checkpoint that validation found best instead.

    Returns:
        The paths written, `output` first.

    Raises:
        UserError: if there is no run, or it cannot be told in this layout.
    """
    check_output(output)
    config, _, params, step = read_run(workdir, best=best)
    config = _shareable(config)
    tensors, metadata = to_reference(config, jax.device_get(params)), {"format": "pt"}
    beside: dict[str, bytes] = {}
    card_config = config
    if layout != REFERENCE:
        require(
            not (output.parent / FOLDER).exists(),
            f"--output: {output.parent} is a run's, whose {CONFIG_FILE} would be lost; name another folder",
        )
        require(
            config.model.encoder == "vit" and config.model.method != "classifier",
            f"--layout: transformers has no model that computes what this {config.model.encoder} "
            f"{config.model.method} does; write --layout reference",
        )
        require(layout == "vit" or config.model.method != "simmim", "--layout: SimMIM has no decoder; choose vit")
        require(
            layout == "vit" or config.image_size[0] == config.image_size[1],
            f"--layout: the decoder of transformers wants square images, not {config.image_size}; choose vit",
        )
        require(
            output.name == TRANSFORMERS_FILE,
            f"--output: transformers looks for {TRANSFORMERS_FILE}; end {output} in /{TRANSFORMERS_FILE}",
        )
        _check_not_anothers(output.parent)
        tensors = to_huggingface(layout, tensors)
        config = config.copy_and_resolve_references()
        if "secondary_ratio" in config.model:
            config.model.secondary_ratio = 0.0  # its token has no place in the file
        beside["config.json"] = json.dumps(model_config(layout, config), indent=2).encode()
        beside["preprocessor_config.json"] = json.dumps(preprocessor_config(config), indent=2).encode()
    elif config.model.encoder != "vit":
        beside[BACKBONE.name] = BACKBONE.read_bytes()
    metadata |= {"config": to_json(config), "step": str(step), "umae_jax": umae_jax.__version__}
    count = sum(array.size for array in tensors.values())
    card = model_card(card_config, file=output.name, layout=layout, step=step, parameters=count)
    output.parent.mkdir(parents=True, exist_ok=True)
    readme = output.with_name("README.md")
    if readme.exists():
        text = readme.read_text(errors="replace")
        if OURS not in text or f'"{output.name}"' not in text:
            readme = output.with_suffix(".md")  # that one is somebody's own, or of another file
    beside[readme.name] = card.encode()
    weights = encode_weights(output.suffix, Weights(tensors, metadata))
    write_together({output: weights} | {output.with_name(name): data for name, data in beside.items()})
    return [output, *(output.with_name(name) for name in sorted(beside))]


def _check_not_anothers(folder: Path) -> None:
    """Check that a folder holds no model for transformers that is not ours to write anew."""
    there = folder / "config.json"
    ours = False
    if there.is_file():
        with contextlib.suppress(ValueError):
            ours = WRITER in json.loads(there.read_bytes())
    require(ours or not there.exists(), f"--output: {there} is of another model; name another folder")
