"""Judge a model: accuracy, probes of its frozen features, or the classes of some images.

    python -m umae_jax.evaluate --workdir DIR                     top-1 and top-5 of a fine-tuned run
    python -m umae_jax.evaluate --workdir DIR --probe knn         or linear, of any run
    python -m umae_jax.evaluate --workdir DIR --images PATH       what a fine-tuned run says of a picture or a folder

Data are those of the run's configuration, unless --source and --validation name others.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from umae_jax import cli, multihost
from umae_jax.data.on_device import normalize
from umae_jax.data.sources import open_images, open_source
from umae_jax.data.transforms import load_whole, reason
from umae_jax.errors import listing, require
from umae_jax.files import locate, locate_here
from umae_jax.training.evaluation import make_evaluator, open_labelled_validation, open_validation
from umae_jax.training.metrics import duration
from umae_jax.training.probes import PROBES, knn_accuracy, linear_accuracy, make_reader
from umae_jax.training.runs import StoredRun, read_run
from umae_jax.training.sharding import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run.")
_BEST = flags.DEFINE_boolean("best", False, "Take the checkpoint that validation found best, not the newest.")
_PROBE = flags.DEFINE_enum("probe", None, PROBES, "Judge frozen features by their neighbours or a linear layer.")
_STAGE = flags.DEFINE_integer("stage", None, "Whose features are probed: 0 is the first stage, -1 the last.")
_IMAGES = flags.DEFINE_string("images", None, "An image file, or a folder of them, to classify.")
_SOURCE = flags.DEFINE_string("source", None, "Labelled training images for a probe: folder:PATH or tfds:NAME.")
_VALIDATION = flags.DEFINE_string("validation", None, "Labelled images to measure on: folder:PATH or tfds:NAME.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images at a time, over all devices.", lower_bound=1)
_JSON = flags.DEFINE_boolean("json", False, "Print JSON.")
_CLUSTER = multihost.define_flags()
LIKELIEST = 5  # classes named for an image


def _tell(line: str, values: dict[str, object]) -> None:
    cli.result(json.dumps(values) if _JSON.value else line)


def measure_accuracy(run: StoredRun, batch_size: int) -> None:
    """Top-1 and top-5 on the whole validation set."""
    config = run.config
    where = config.validation.source
    require(where is not None, "--validation is missing; write --validation with folder:PATH or tfds:NAME")
    source = open_labelled_validation(config, "--validation")
    names = config.data.class_names
    require(
        len(source.classes) == config.model.classes,
        f"--validation: {where} has {len(source.classes)} classes, the model {config.model.classes}",
    )
    others = [theirs for ours, theirs in zip(names, source.classes, strict=False) if ours != theirs]
    require(
        not others,
        f"--validation: the model was not trained on these classes of {where}: {listing(others)}; "
        "name images of its own classes",
    )
    mesh = make_mesh()
    accuracy = make_evaluator(config, run.graph, run.params, source, mesh, batch_size)(run.params)
    line = f"top-1 {accuracy.top1:.2%}, top-5 {accuracy.top5:.2%} of {accuracy.images:,} images"
    line += f"; {accuracy.unreadable} could not be read and do not count" if accuracy.unreadable else ""
    _tell(line, {"step": run.step, **accuracy._asdict()})


def probe_features(run: StoredRun, probe: str, batch_size: int) -> None:
    """Accuracy of a probe on the features of one stage."""
    config = run.config
    source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    keys = ("--source", "--validation")
    validation = open_validation(config, source, keys=keys)
    if validation is None:
        require(False, "--validation is missing; write --validation with folder:PATH or tfds:NAME")
        return
    read = make_reader(config, run.graph, run.params, make_mesh(), batch_size)
    start = time.monotonic()
    training = read(run.params, source, keys[0], config.probe.images)
    queries = read(run.params, validation, keys[1])
    count, width = training.features.shape
    cli.say(f"read {count + len(queries.labels):,} features of width {width} in {duration(time.monotonic() - start)}")
    values: dict[str, object] = {"step": run.step, "probe": probe, "stage": config.probe.stage}
    if probe == "knn":
        options = {"neighbors": config.probe.neighbors, "temperature": config.probe.temperature}
        top1 = knn_accuracy(training, queries, classes=len(source.classes), **options)
    else:
        top1, penalty = linear_accuracy(training, queries, classes=len(source.classes), seed=config.seed)
        options = {"penalty": penalty}
    told = ", ".join(f"{key} {value:g}" for key, value in options.items())
    unreadable = training.unreadable + queries.unreadable
    images = {"training_images": count, "images": len(queries.labels), "unreadable": unreadable}
    line = f"{probe} top-1 {top1:.2%} of {images['images']:,} images, from {count:,} ({told})"
    line += f"; {unreadable} could not be read and do not count" if unreadable else ""
    _tell(line, {**values, **options, **images, "top1": top1})


def classify(run: StoredRun, path: Path) -> None:
    """The likeliest classes of each image."""
    config = run.config
    source = open_images(path)
    names = config.data.class_names or tuple(f"class {number}" for number in range(config.model.classes))

    @jax.jit
    def probabilities(params: nnx.State, images: jax.Array) -> jax.Array:
        images = normalize(images, config.data.mean, config.data.std)
        return jax.nn.softmax(nnx.merge(run.graph, params)(images))

    failures = 0
    for place in range(len(source)):
        name, data, _ = source[place]
        try:
            pixels = load_whole(data, config.image_size, config.model.channels, config.validation.crop)
        except Exception as error:  # decoders raise anything
            failures += 1
            cli.say(f"{name} cannot be read ({reason(error)})")
            continue
        likelihoods = np.asarray(probabilities(run.params, jnp.asarray(pixels[None])))[0]
        best = np.argsort(-likelihoods)[:LIKELIEST]
        line = f"{name}: " + ", ".join(f"{names[number]} {likelihoods[number]:.1%}" for number in best)
        _tell(line, {"image": name, "classes": {names[number]: float(likelihoods[number]) for number in best}})
    require(failures < len(source), f"--images: none of the images in {path} can be read")


def main() -> None:
    """Judge a run by what the flags ask for."""
    workdir = locate(cli.required(_WORKDIR, "the directory of a run"), "--workdir")
    require(
        not (_PROBE.value and _IMAGES.value), "--probe and --images: one judges the model, one an image; choose one"
    )
    require(
        bool(_PROBE.value) or (_SOURCE.value is None and _STAGE.value is None),
        "--source and --stage are those of a probe; add --probe knn or --probe linear, or leave them out",
    )
    cli.join(_CLUSTER, None, None)
    run = read_run(workdir, best=_BEST.value)
    config = run.config.unlock()
    config.data.source = _SOURCE.value or config.data.source
    config.validation.source = _VALIDATION.value or config.validation.source
    if _STAGE.value is not None:
        stages = len(config.model.depths)
        require(-stages <= _STAGE.value < stages, f"--stage: there are {stages} stages, from 0 to {stages - 1}")
        config.probe.stage = _STAGE.value
    devices = jax.device_count()
    batch_size = -(-_BATCH_SIZE.value // devices) * devices  # the devices share it evenly
    if _PROBE.value:
        probe_features(run, _PROBE.value, batch_size)
        return
    require(
        config.model.method == "classifier",
        f"--workdir: {workdir} holds no classifier; add --probe knn or --probe linear, or fine-tune it first",
    )
    if _IMAGES.value:
        classify(run, locate_here(_IMAGES.value, "--images"))
    else:
        measure_accuracy(run, batch_size)


if __name__ == "__main__":
    cli.run(main)
