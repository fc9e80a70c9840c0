"""Show what a detection data set holds: classes, boxes, sizes, what is left out, and a picture of a few images.

    python -m umae_jax.inspect_data --source coco:FOLDER [--split val] [--output FILE.png]

A source is coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME. The picture shows images spread over the data set.
"""

from absl import flags

from umae_jax import cli, console
from umae_jax.data.annotations import open_annotated
from umae_jax.drawing import encode_png
from umae_jax.files import locate_local, write_atomic
from umae_jax.inspection import describe, draw

_SOURCE = flags.DEFINE_string("source", None, "Annotated images: coco:FOLDER, coco:JSON@IMAGES or tfds:NAME.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of a folder or data set: train or val.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of TFDS data sets.")
_OUTPUT = flags.DEFINE_string("output", None, "PNG file of annotated images to write.")


def main() -> None:
    """Print the description of the source that the flags name, and write the picture."""
    name = cli.required(_SOURCE, "coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME")
    output = locate_local(_OUTPUT.value, "--output") if _OUTPUT.value else None
    source = open_annotated(name, split=_SPLIT.value, key="--", data_dir=_DATA_DIR.value)
    console.result(source.summary)
    for line in describe(source):
        console.result(line)
    if output is not None:
        write_atomic(output, encode_png(draw(source)))
        console.result(f"wrote {output}")


if __name__ == "__main__":
    cli.run(main, compiles=False)
