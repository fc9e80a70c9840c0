"""Bring weights in from other programs, and take them out to others.

    python -m umae_jax.convert FILE --workdir DIR [--config FILE]
    python -m umae_jax.convert DIR --output FILE [--layout reference|vit_mae|vit] [--best]

In: a `.pth` of the reference, `.safetensors` or `.npz` becomes a run's directory, from which every command goes on. The
model is told from the file's metadata or shapes, unless --config names it. Out: the newest checkpoint becomes a
`.safetensors` or `.pth` in the reference's names, decoder included, with a model card beside it and, for Swin and PVT,
the PyTorch file that loads it; a ViT also in Hugging Face's names, `--output FOLDER/model.safetensors`.
"""

from absl import flags

from umae_jax import cli
from umae_jax.config import check
from umae_jax.errors import require
from umae_jax.files import locate, locate_here
from umae_jax.weights.exchange import REFERENCE, export_weights, import_weights
from umae_jax.weights.huggingface import LAYOUTS, weights_in

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "In: the directory to make of the file.")
_OUTPUT = flags.DEFINE_string("output", None, "Out: the file to write, .safetensors or .pth.")
_LAYOUT = flags.DEFINE_enum(
    "layout",
    REFERENCE,
    [REFERENCE, *LAYOUTS],
    "Out: whose names; vit_mae and vit are ViTMAEForPreTraining and ViTModel of transformers.",
)
_BEST = flags.DEFINE_boolean("best", False, "Out: the checkpoint that validation found best, not the newest.")


def main(source: str = "") -> None:
    """Convert in the direction that the argument says: a file comes in, a directory goes out."""
    require(bool(source), "name what to convert: a FILE of weights with --workdir, or a run's DIR with --output")
    path = weights_in(locate(source, "FILE or DIR"))
    require(path.exists(), f"there is no file or directory {path}")
    if path.is_dir():
        output = locate_here(cli.required(_OUTPUT, "the file to write, .safetensors or .pth"), "--output")
        written = export_weights(path, output, _LAYOUT.value, best=_BEST.value)
        cli.say(f"beside it: {', '.join(beside.name for beside in written[1:])}")
        print(output)  # noqa: T201 - the result
    else:
        workdir = locate_here(cli.required(_WORKDIR, "the directory to make of the file"), "--workdir")
        config = None
        if flags.FLAGS["config"].present:
            config = cli.read_config(_CONFIG)
            check(config)
        model = import_weights(path, workdir, config).model
        cli.say(f"it holds a {model.encoder} of widths {model.widths} and depths {model.depths}, {model.method}")
        print(workdir)  # noqa: T201 - the result


if __name__ == "__main__":
    cli.run(main, arguments=1)
