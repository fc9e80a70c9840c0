"""Whole runs from files of weights, and files of weights from whole runs."""

import json
import shutil
from pathlib import Path

import jax
from ml_collections import ConfigDict

import umae_jax
from umae_jax import export
from umae_jax.config import CONFIG_FILE, to_json
from umae_jax.errors import require
from umae_jax.files import write_whole
from umae_jax.training.checkpoint import FOLDER, Checkpoints
from umae_jax.training.mesh import make_mesh
from umae_jax.training.runs import describe, read_run, start_from
from umae_jax.weights.card import OURS, model_card
from umae_jax.weights.files import Weights, check_output, write_weights
from umae_jax.weights.huggingface import model_config, preprocessor_config, to_huggingface
from umae_jax.weights.recognize import read_model
from umae_jax.weights.reference import from_reference, to_reference

REFERENCE = "reference"
TRANSFORMERS_FILE = "model.safetensors"
BACKBONE = Path(export.__file__).with_name("umae_backbone.py")


def take_in(file: Path, workdir: Path, config: ConfigDict | None = None) -> ConfigDict:
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
    require(
        not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())),
        f"--workdir: {workdir} is there and not empty; choose another, so that nothing is lost",
    )
    config, tensors = read_model(file, config)
    run = describe(config, make_mesh())
    params = from_reference(config, run.state.params, tensors, name=str(file))
    part = workdir.with_name(f".{workdir.name}.part")  # takes its name when it is whole
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    checkpoints = Checkpoints(part)
    checkpoints.save(0, start_from(run, params), samples=0)
    checkpoints.wait()
    checkpoints.close()
    write_whole(part / CONFIG_FILE, to_json(config).encode())
    part.replace(workdir)
    return config


def _shareable(config: ConfigDict) -> ConfigDict:
    """A configuration without the paths of this machine."""
    config = config.copy_and_resolve_references()
    kind, _, place = config.data.source.partition(":")
    config.data.source = f"{kind}:{Path(place).name}" if place else kind
    config.data.data_dir = None
    return config


def take_out(workdir: Path, output: Path, layout: str = REFERENCE) -> list[Path]:
    """Write a file of weights, and what belongs beside it, of a run's newest checkpoint.

    Args:
        workdir: of the run.
        output: the file, .safetensors or .pth.
        layout: whose names, "reference" or one of `huggingface.LAYOUTS`.

    Returns:
        The paths written, `output` first.

    Raises:
        UserError: if there is no run, or it cannot be told in this layout.
    """
    check_output(output)
    config, _, params, step = read_run(workdir)
    config = _shareable(config)
    tensors, metadata = to_reference(config, jax.device_get(params)), {"format": "pt"}
    beside = {}
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
            output.name == TRANSFORMERS_FILE,
            f"--output: transformers looks for {TRANSFORMERS_FILE}; end {output} in /{TRANSFORMERS_FILE}",
        )
        tensors = to_huggingface(layout, tensors)
        beside["config.json"] = json.dumps(model_config(layout, config), indent=2).encode()
        beside["preprocessor_config.json"] = json.dumps(preprocessor_config(config), indent=2).encode()
    elif config.model.encoder != "vit":
        beside[BACKBONE.name] = BACKBONE.read_bytes()
    metadata |= {"config": to_json(config), "step": str(step), "umae_jax": umae_jax.__version__}
    count = sum(array.size for array in tensors.values())
    card = model_card(config, file=output.name, layout=layout, step=step, parameters=count)
    output.parent.mkdir(parents=True, exist_ok=True)
    readme = output.with_name("README.md")
    if readme.exists() and OURS not in readme.read_text(errors="replace"):
        readme = output.with_suffix(".md")  # that one is somebody's own
    beside[readme.name] = card.encode()
    for name, data in beside.items():
        write_whole(output.with_name(name), data)
    write_weights(output, Weights(tensors, metadata))
    return [output, *(output.with_name(name) for name in sorted(beside))]
