"""Bring weights in from other programs, and take them out to others.

    python -m umae_jax.convert FILE --workdir DIR [--config FILE]
    python -m umae_jax.convert DIR --output FILE [--layout reference|vit_mae|vit]

In: a `.pth` of the reference, `.safetensors` or `.npz` becomes a run's directory, from which every command goes on. The
model is told from the file's metadata or shapes, unless --config names it. Out: the newest checkpoint becomes a
`.safetensors` or `.pth` in the reference's names, decoder included, with a model card beside it and, for Swin and PVT,
the PyTorch file that loads it; a ViT also in Hugging Face's names, `--output FOLDER/model.safetensors`.
"""

import json
import shutil
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

import umae_jax
from umae_jax import cli, export
from umae_jax.config import CONFIG_FILE, check, to_json
from umae_jax.errors import require
from umae_jax.files import write_whole
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.mesh import make_mesh
from umae_jax.training.runs import describe, read_run
from umae_jax.training.step import init_state
from umae_jax.weights.card import OURS, model_card
from umae_jax.weights.files import Weights, check_output, write_weights
from umae_jax.weights.huggingface import LAYOUTS, model_config, preprocessor_config, to_huggingface
from umae_jax.weights.recognize import read_model
from umae_jax.weights.reference import from_reference, to_reference

TRANSFORMERS_FILE = "model.safetensors"
BACKBONE = Path(export.__file__).with_name("umae_backbone.py")

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "In: the directory to make of the file.")
_OUTPUT = flags.DEFINE_string("output", None, "Out: the file to write, .safetensors or .pth.")
_LAYOUT = flags.DEFINE_enum(
    "layout",
    "reference",
    ["reference", *LAYOUTS],
    "Out: whose names; vit_mae and vit are ViTMAEForPreTraining and ViTModel of transformers.",
)


def take_in(file: Path, workdir: Path, config: ConfigDict | None) -> None:
    """Make a run's directory, at step 0, of a file of weights.

    Raises:
        UserError: if the file is not what it should be, or the directory holds a run.
    """
    require(
        not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())),
        f"--workdir: {workdir} is there and not empty; choose another, so that nothing is lost",
    )
    config, tensors = read_model(file, config)
    run = describe(config, make_mesh())
    params = from_reference(config, run.state.params, tensors, name=str(file))
    shardings = jax.tree.map(lambda array: array.sharding, run.state)
    params = jax.device_put(params, shardings.params)
    state = jax.jit(lambda params: init_state(params, run.optimizer), out_shardings=shardings)(params)
    part = workdir.with_name(f".{workdir.name}.part")  # takes its name when it is whole
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    checkpoints = Checkpoints(part)
    checkpoints.save(0, state, samples=0)
    checkpoints.wait()
    checkpoints.close()
    write_whole(part / CONFIG_FILE, to_json(config).encode())
    part.replace(workdir)
    count = sum(array.size for array in jax.tree.leaves(params))
    model = config.model
    cli.say(f"{model.method}, {model.encoder} of widths {model.widths} and depths {model.depths}: {count:,} parameters")
    print(workdir)  # noqa: T201 - the result


def _shareable(config: ConfigDict) -> ConfigDict:
    """A configuration without the paths of this machine."""
    config = config.copy_and_resolve_references()
    kind, _, place = config.data.source.partition(":")
    config.data.source = f"{kind}:{Path(place).name}" if place else kind
    config.data.data_dir = None
    return config


def take_out(workdir: Path, output: Path, layout: str) -> None:
    """Write a file of weights, and what belongs beside it, of a run's newest checkpoint.

    Raises:
        UserError: if there is no run, or it cannot be told in this layout.
    """
    check_output(output)
    config, _, params, step = read_run(workdir)
    config = _shareable(config)
    tensors, metadata = to_reference(config, jax.device_get(params)), {"format": "pt"}
    beside = {}
    if layout != "reference":
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
        readme = output.with_suffix(".md")
        cli.say(f"README.md is another's: the model card is {readme.name}")
    beside[readme.name] = card.encode()
    for name, data in beside.items():
        write_whole(output.with_name(name), data)
    write_weights(output, Weights(tensors, metadata))
    cli.say(f"beside it: {', '.join(sorted(beside))}")
    print(output)  # noqa: T201 - the result


def main(source: str = "") -> None:
    """Convert in the direction that the argument says: a file comes in, a directory goes out."""
    require(bool(source), "name what to convert: a FILE of weights with --workdir, or a run's DIR with --output")
    path = Path(source).expanduser()
    require(path.exists(), f"there is no file or directory {path}")
    if path.is_dir():
        output = Path(cli.required(_OUTPUT, "the file to write, .safetensors or .pth")).expanduser()
        take_out(path, output, _LAYOUT.value)
    else:
        workdir = Path(cli.required(_WORKDIR, "the directory to make of the file")).expanduser()
        config = None
        if flags.FLAGS["config"].present:
            config = cli.read_config(_CONFIG)
            check(config)
        take_in(path, workdir, config)


if __name__ == "__main__":
    cli.run(main, arguments=1)
