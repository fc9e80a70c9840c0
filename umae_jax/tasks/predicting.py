"""Classes of images without labels, and tables of them."""

import csv
import io
import math
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from umae_jax.console import duration, say, warn
from umae_jax.data.pipeline import EvalLoader, abstract_batch, readers
from umae_jax.data.sources import ImageFiles
from umae_jax.data.transforms import LoadCentralCrop
from umae_jax.errors import UserError, printable, require
from umae_jax.files import AnyPath, in_bucket, write_atomic
from umae_jax.multihost import is_primary
from umae_jax.training.sharding import batch_sharding, replicated
from umae_jax.training.task import Batch, Params, Prediction
from umae_jax.weights.stored_run import StoredRun

NUM_PREDICTED = 5  # classes named per image


def predict_images(run: StoredRun, source: ImageFiles, mesh: Mesh, batch_size: int) -> Iterator[Prediction]:
    """Yield the most probable classes of each image and their probabilities, computed in batches on all devices.

    Images that cannot be read are named on the terminal, and counted at the end.

    Args:
        run: of a classifier, its parameters replicated on the mesh.
        source: the images.
        mesh: the devices.
        batch_size: global; a multiple of the number of devices.

    Raises:
        UserError: at the end, if no image can be read.
    """
    config = run.config
    names = run.classes or [f"class {number}" for number in range(config.model.classes)]
    batch_size = min(batch_size, math.ceil(len(source) / mesh.size) * mesh.size)

    def classify(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        probabilities = jax.nn.softmax(nnx.merge(run.graph, params)(batch["image"]))
        return *jax.lax.top_k(probabilities, min(NUM_PREDICTED, len(names))), batch["valid"]

    sharding = batch_sharding(mesh)
    image = jax.ShapeDtypeStruct((*config.image_size, config.model.channels), jnp.uint8)
    shapes = abstract_batch({"image": image, "valid": jax.ShapeDtypeStruct((), jnp.bool_)}, batch_size, sharding)
    compiled = jax.jit(classify, out_shardings=replicated(mesh)).lower(run.params, shapes).compile()
    loader = EvalLoader(
        len(source),
        LoadCentralCrop(source, config.image_size, config.model.channels, config.validation.crop),
        batch_size=batch_size,
        sharding=sharding,
        readers=readers(config),
    )
    start, index, failures = time.monotonic(), 0, 0
    hidden = not (is_primary() and sys.stderr.isatty())
    with tqdm(total=len(source), unit="image", dynamic_ncols=True, leave=False, disable=hidden) as bar:
        for probabilities, classes, valid in _read_behind(compiled, run.params, loader):
            for row in range(min(batch_size, len(source) - index)):
                if valid[row]:
                    name = printable(source.name(index))
                    top = {names[k]: float(p) for k, p in zip(classes[row], probabilities[row], strict=True)}
                    line = ", ".join(f"{printable(label)} {value:.1%}" for label, value in top.items())
                    yield f"{name}: {line}", {"image": name, "classes": top}
                else:
                    failures += 1
                index += 1
                bar.update()
    if failures == len(source):
        raise UserError("--images: none of the images can be read; repair them or name others")
    seconds = time.monotonic() - start
    say(f"classified {index - failures:,} images in {duration(seconds)}, {index / seconds:,.0f} images/s")
    if failures:
        warn(f"{failures:,} of {index:,} images cannot be read and are left out")


def _read_behind(
    compiled: jax.stages.Compiled, params: Params, batches: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield results on the host, each after the next batch is dispatched, so that the devices never wait."""
    pending = None
    for batch in batches:
        results = compiled(params, batch)
        if pending is not None:
            yield jax.device_get(pending)
        pending = results
    if pending is not None:
        yield jax.device_get(pending)


def check_table(path: AnyPath | None) -> None:
    """Check that a CSV file can be written to this path; None is no file.

    Raises:
        UserError: if it has another suffix, or its folder does not exist.
    """
    if path is not None:
        require(path.suffix == ".csv", f"--output: {path} must end with .csv")
        require(in_bucket(path) or path.parent.is_dir(), f"--output: there is no folder {path.parent}")


def write_csv(predictions: Iterable[Prediction], path: AnyPath) -> Prediction:
    """Write a row per image, image, class, probability, class_2, probability_2, ...; return their number.

    The file appears once it is complete. Probabilities are fractions.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    count = 0
    for count, (_, values) in enumerate(predictions, 1):
        if count == 1:
            numbers = ["", *(f"_{number}" for number in range(2, len(values["classes"]) + 1))]
            writer.writerow(
                ["image", *(f"{column}{number}" for number in numbers for column in ("class", "probability"))]
            )
        pairs = ((printable(name), f"{value:.6f}") for name, value in values["classes"].items())
        writer.writerow([values["image"], *(cell for pair in pairs for cell in pair)])
    if is_primary():
        write_atomic(path, table.getvalue().encode())
    return f"{count:,} images in {path}", {"images": count, "output": str(path)}
