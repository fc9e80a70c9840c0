"""Models from weight files, and weight files from runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from umae_jax import export
from umae_jax.config import from_json, old_class_names, to_json
from umae_jax.errors import UserError, naming, require
from umae_jax.files import AnyPath, write_together
from umae_jax.version import __version__
from umae_jax.weights.files import Weights, check_output, encode_weights, read_weights
from umae_jax.weights.hub import GENERATED, WRITER, model_card, transformers_files
from umae_jax.weights.huggingface import WEIGHTS_FILE, from_huggingface, to_huggingface
from umae_jax.weights.names import fixed_tables, to_reference
from umae_jax.weights.prefixes import remove_prefix
from umae_jax.weights.recognize import USE_CONFIG, recognize
from umae_jax.weights.stored_run import FOLDER, read_run

REFERENCE = "reference"
BACKBONE = Path(export.__file__).with_name("umae_backbone.py")


class Model(NamedTuple):
    """A model read from a weight file."""

    config: ConfigDict
    tensors: Mapping[str, np.ndarray]  # state dict with the reference's names
    classes: tuple[str, ...]  # class names, () if unknown


def read_model(path: AnyPath, config: ConfigDict | None = None, *, encoder_only: bool = False) -> Model:
    """Read a weight file with the parameter names of the reference or of transformers.

    Args:
        path: the file.
        config: the model's configuration; None: read it from the metadata or, if they have none, infer it from shapes.
        encoder_only: ignore the decoder when inferring the configuration.

    Raises:
        UserError: if the file is damaged, would run code or holds an unknown architecture.
    """
    tensors, metadata = read_weights(path)
    tensors = from_huggingface(remove_prefix(tensors, str(path)))
    try:
        classes = tuple(map(str, json.loads(metadata.get("classes", "[]"))))
        if config is None and "config" in metadata:
            config = from_json(metadata["config"])
            classes = classes or old_class_names(metadata["config"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: invalid configuration or classes in the metadata ({error}); {USE_CONFIG}") from None
    return Model(config or recognize(tensors, str(path), encoder_only=encoder_only), tensors, classes)


def export_weights(
    workdir: AnyPath,
    output: Path,
    layout: str = REFERENCE,
    *,
    best: bool = False,
    state_dict: Callable[[ConfigDict, nnx.State], dict[str, np.ndarray]] = to_reference,
) -> list[Path]:
    """Export a run's newest checkpoint as a weight file, with a model card and the files that other frameworks need.

    Args:
        workdir: the run's directory.
        output: the file to write, .safetensors or .pth.
        layout: parameter names, "reference" or a key of `huggingface.LAYOUTS`.
        best: export the checkpoint with the best validation metric instead of the newest.
        state_dict: converts a configuration and parameters on the host to tensors with the names of layout "reference".

    Returns:
        The paths written, `output` first.

    Raises:
        UserError: if there is no run, or the layout cannot hold its model.
    """
    check_output(output)
    with naming("DIR"):
        run = read_run(workdir, best=best)
    config = without_paths(run.config)
    tensors, fixed = state_dict(config, jax.device_get(run.params)), fixed_tables(config)
    beside: dict[str, bytes] = {}
    if layout != REFERENCE:
        _check_transformers(config, layout, output)
        tensors, fixed = to_huggingface(layout, tensors), to_huggingface(layout, fixed)
        beside = transformers_files(layout, config)
    elif len(config.model.depths) > 1 and "backbone" not in run.params:  # a pyramid
        beside[BACKBONE.name] = BACKBONE.read_bytes()
    output.parent.mkdir(parents=True, exist_ok=True)
    readme = output.with_name("README.md")
    if readme.exists():
        text = readme.read_text(errors="replace")
        if GENERATED not in text or f'"{output.name}"' not in text:
            readme = output.with_suffix(".md")  # keep a card that was edited or describes another file
    count = sum(array.size for name, array in tensors.items() if name not in fixed)
    card = model_card(config, file=output.name, layout=layout, step=run.step, parameters=count)
    beside[readme.name] = card.encode()
    if layout != REFERENCE and "secondary_ratio" in config.model:
        config.model.secondary_ratio = 0.0  # these layouts have no token for secondary masking
    weights = encode_weights(output.suffix, Weights(tensors, metadata_of(config, run.step, run.classes)))
    write_together({output: weights} | {output.with_name(name): data for name, data in beside.items()})
    return [output, *(output.with_name(name) for name in sorted(beside))]


def without_paths(config: ConfigDict) -> ConfigDict:
    """Return a copy of a run's configuration without local paths, for a file to be shared."""
    config = config.copy_and_resolve_references()
    kind, _, path = config.data.source.partition(":")
    config.data.source = f"{kind}:{Path(path).name}" if path else kind
    config.data.data_dir = config.init = config.validation.source = None
    if "semantic" in config.data:
        config.data.semantic = None
    return config


def metadata_of(config: ConfigDict, step: int, classes: Sequence[str] = ()) -> dict[str, str]:
    """Return the metadata of a weight file: all that `read_model` needs to build the model."""
    metadata = {"format": "pt", "config": to_json(config), "step": str(step), "umae_jax": __version__}
    return metadata | ({"classes": json.dumps(classes)} if classes else {})


def _check_transformers(config: ConfigDict, layout: str, output: Path) -> None:
    """Check that transformers supports this model, and that its files overwrite no others."""
    model = config.model
    require(
        len(model.depths) == 1 and "classes" not in model,
        f"--layout: transformers has no model for a {model.encoder} with {model.method}; write --layout reference",
    )
    if layout == "vit_mae":
        require("decoder_width" in model, "--layout: vit_mae needs a decoder, which SimMIM lacks; choose vit")
        require(
            config.image_size[0] == config.image_size[1],
            f"--layout: vit_mae needs square images, not {config.image_size}; choose vit",
        )
    require(
        output.name == WEIGHTS_FILE,
        f"--output: transformers reads only {WEIGHTS_FILE}; write {output.parent / WEIGHTS_FILE}",
    )
    config_file = output.parent / "config.json"
    ours = f'"{WRITER}"'.encode()
    require(
        not config_file.exists() or (ours in config_file.read_bytes() and not (output.parent / FOLDER).exists()),
        f"--output: {config_file} belongs to a run or another model and would be lost; choose another folder",
    )
