"""Show what a pre-trained model sees and predicts of some images.

python -m umae_jax.visualize --workdir DIR --images PATH --output FILE.png
"""

from absl import flags

from umae_jax import cli
from umae_jax.config import MAX_SEED
from umae_jax.data.sources import open_images
from umae_jax.data.transforms import first_readable
from umae_jax.errors import require
from umae_jax.files import locate, locate_here, write_whole
from umae_jax.pictures import STATISTICS, make_illustrator
from umae_jax.training.runs import read_run

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a pre-training run.")
_IMAGES = flags.DEFINE_string("images", None, "An image file, or a folder of them.")
_OUTPUT = flags.DEFINE_string("output", None, "The PNG to write.")
_COUNT = flags.DEFINE_integer("count", 8, "How many images of a folder to show.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the masks.", lower_bound=0, upper_bound=MAX_SEED)
_STATISTICS = flags.DEFINE_enum(
    "statistics",
    "visible",
    list(STATISTICS),
    "What to de-normalise normalised predictions with: the nearest visible units, or each unit's own truth.",
)


def main() -> None:
    """Draw the picture."""
    workdir = locate(cli.required(_WORKDIR, "the directory of a pre-training run"), "--workdir")
    path = locate_here(cli.required(_IMAGES, "an image file or a folder of them"), "--images")
    output = locate_here(cli.required(_OUTPUT, "the PNG to write"), "--output")
    require(output.suffix.lower() == ".png", f"--output: a picture is written as PNG; end {output} in .png")
    source = open_images(path)
    run = read_run(workdir)
    require(
        run.config.model.method != "classifier",
        f"--workdir: {workdir} holds a classifier, which predicts no pixels; name a pre-training run",
    )
    images = first_readable(source, _COUNT.value, run.config.image_size, run.config.model.channels)
    illustrate = make_illustrator(
        run.graph,
        images,
        seed=_SEED.value,
        mean=run.config.data.mean,
        std=run.config.data.std,
        statistics=_STATISTICS.value,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, illustrate(run.params, f"step {run.step}"))
    print(output)  # noqa: T201 - the result


if __name__ == "__main__":
    cli.run(main)
