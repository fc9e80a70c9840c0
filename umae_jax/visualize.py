"""Draw images and their reconstructions by a pre-trained model.

python -m umae_jax.visualize --workdir DIR --images PATH --output FILE.png
"""

from absl import flags

from umae_jax import cli, console
from umae_jax.config import MAX_SEED
from umae_jax.data.sources import open_images
from umae_jax.errors import naming, require
from umae_jax.files import locate, locate_local, write_atomic

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a pre-training run.")
_IMAGES = flags.DEFINE_string("images", None, "An image file, or a folder of image files.")
_OUTPUT = flags.DEFINE_string("output", None, "The PNG file to write.")
_COUNT = flags.DEFINE_integer("count", 8, "Max images of a folder to draw.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the masks.", lower_bound=0, upper_bound=MAX_SEED)
_STATISTICS = flags.DEFINE_enum(
    "statistics",
    "visible",
    ["visible", "unit"],
    "Mean and std that de-normalise predictions: of the nearest visible units, or the true ones of each unit.",
)


def main() -> None:
    """Draw one picture of the images, their masks and their reconstructions."""
    workdir = locate(cli.required(_WORKDIR, "the directory of a pre-training run"), "--workdir")
    path = locate_local(cli.required(_IMAGES, "an image file or a folder of image files"), "--images")
    output = locate_local(cli.required(_OUTPUT, "the PNG file to write"), "--output")
    require(output.suffix.lower() == ".png", f"--output: end {output} in .png")
    source = open_images(path)
    if source.summary:
        console.say(source.summary)

    from flax import nnx  # imports JAX

    from umae_jax.data.transforms import first_readable
    from umae_jax.models.masked import MaskedImageModel
    from umae_jax.pictures import make_illustrator
    from umae_jax.weights.stored_run import read_run

    with naming("--workdir"):
        run = read_run(workdir)
    require(
        isinstance(nnx.merge(run.graph, run.params), MaskedImageModel),
        f"--workdir: {workdir} holds a {run.config.model.method}, which predicts no pixels; name a pre-training run",
    )
    images = first_readable(source, _COUNT.value, run.config.image_size, run.config.model.channels)
    illustrate = make_illustrator(run.graph, images, seed=_SEED.value, statistics=_STATISTICS.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, illustrate(run.params, f"step {run.step}"))
    console.result(output)


if __name__ == "__main__":
    cli.run(main)
