"""Import weights into a run, or export a run's weights.

    python -m umae_jax.convert FILE --workdir DIR [--config FILE]
    python -m umae_jax.convert DIR --output FILE [--layout reference|vit_mae|vit] [--best]

Import: a `.pth`, `.safetensors` or `.npz` file becomes the directory of a run, which every command accepts. Without
--config, the file's metadata or the shapes of its tensors determine the model.

Export: the newest checkpoint becomes a `.safetensors` or `.pth` file with the reference's parameter names, decoder
included. Beside it are written a model card and, for Swin and PVT, the PyTorch file that loads the weights. A ViT can
also take the parameter names of transformers: `--output FOLDER/model.safetensors --layout vit_mae`.
"""

from absl import flags

from umae_jax import cli, console
from umae_jax.config import check
from umae_jax.errors import require
from umae_jax.files import locate, locate_local

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Import: the directory to make.")
_OUTPUT = flags.DEFINE_string("output", None, "Export: the file to write, .safetensors or .pth.")
_LAYOUT = flags.DEFINE_enum(
    "layout",
    "reference",
    ["reference", "vit_mae", "vit"],
    "Export: parameter names; vit_mae and vit are transformers' ViTMAEForPreTraining and ViTModel.",
)
_BEST = flags.DEFINE_boolean("best", False, "Export: the checkpoint with the best validation metric, not the newest.")


def main(source: str = "") -> None:
    """Import a weight file, or export the run in a directory."""
    require(bool(source), "FILE or DIR is missing; name a weight FILE with --workdir, or a run's DIR with --output")
    from umae_jax.tasks import state_dict  # imports JAX
    from umae_jax.tasks.importing import import_weights
    from umae_jax.weights.exchange import export_weights
    from umae_jax.weights.huggingface import resolve_weights

    path = resolve_weights(locate(source, "FILE or DIR"))
    require(path.exists(), f"FILE or DIR: there is no file or directory {path}")
    if path.is_dir():
        output = locate_local(cli.required(_OUTPUT, "the file to write, .safetensors or .pth"), "--output")
        written = export_weights(path, output, _LAYOUT.value, best=_BEST.value, state_dict=state_dict)
        console.say(f"also written: {', '.join(file.name for file in written[1:])}")
        console.result(output)
    else:
        workdir = locate_local(cli.required(_WORKDIR, "the directory to make"), "--workdir")
        config = None
        if flags.FLAGS["config"].present:
            config = cli.read_config(_CONFIG)
            check(config)
        model = import_weights(path, workdir, config).model
        console.say(f"imported a {model.encoder} with widths {model.widths} and depths {model.depths} ({model.method})")
        console.result(workdir)


if __name__ == "__main__":
    cli.run(main, arguments=1)
