"""Evaluate a run: its metrics, probes of its frozen features, or predictions for images.

    python -m umae_jax.evaluate --workdir DIR                     top-1 and top-5 of a fine-tuned run, AP of a detector
    python -m umae_jax.evaluate --workdir DIR --probe knn         top-1 of a probe, knn or linear, of any run
    python -m umae_jax.evaluate --workdir DIR --images PATH       classes of an image file, or of each image in a folder
    python -m umae_jax.evaluate --workdir DIR --images PATH --output FILE.csv       the same as a table
    python -m umae_jax.evaluate --workdir DETECTOR --images PATH [--output FOLDER]  objects, also drawn

--source and --validation replace the data of the run's configuration.
"""

import json

from absl import flags

from umae_jax import cli, console
from umae_jax.cluster_flags import ClusterFlags
from umae_jax.errors import require
from umae_jax.files import locate, locate_local

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run.")
_BEST = flags.DEFINE_boolean("best", False, "Use the checkpoint with the best validation metric, not the newest.")
_PROBE = flags.DEFINE_enum("probe", None, ["knn", "linear"], "Probe frozen features by kNN or a linear layer.")
_STAGE = flags.DEFINE_integer("stage", None, "Stage whose features are probed: 0 is the first, -1 the last.")
_IMAGES = flags.DEFINE_string("images", None, "Image file, or folder of them, to classify or to detect objects in.")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where the results of --images go: a CSV file for classes, instead of the terminal; a folder for pictures of "
    "objects, by default DIR/detections.",
)
_SOURCE = flags.DEFINE_string("source", None, "Labelled training images for a probe: folder:PATH or tfds:NAME.")
_VALIDATION = flags.DEFINE_string(
    "validation", None, "Images to evaluate on: folder:PATH, tfds:NAME, or coco:FOLDER for a detector."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per step, over all devices.", lower_bound=1)
_SCALES = flags.DEFINE_multi_integer("scale", [], "Detector: shorter edge in pixels of one more view of each image.")
_FLIP = flags.DEFINE_boolean("flip", False, "Detector: also see each view of an image mirrored.")
_JSON = flags.DEFINE_boolean("json", False, "Print JSON.")
_CLUSTER = ClusterFlags()


def main() -> None:
    """Evaluate the run, probe it, or predict for images."""
    workdir = locate(cli.required(_WORKDIR, "the directory of a run"), "--workdir")
    require(not (_PROBE.value and _IMAGES.value), "--probe and --images cannot be combined; choose one")
    require(
        bool(_PROBE.value) or (_SOURCE.value is None and _STAGE.value is None),
        "--source and --stage belong to a probe; add --probe knn or --probe linear, or leave them out",
    )
    require(_OUTPUT.value is None or _IMAGES.value is not None, "--output belongs to --images; add it, or leave it out")
    require(not (_OUTPUT.value and _JSON.value), "--output and --json cannot be combined; choose one")
    output = locate(_OUTPUT.value, "--output") if _OUTPUT.value else None
    from umae_jax.tasks import evaluation  # imports JAX

    cli.join(_CLUSTER, None, None)
    run = evaluation.open_run(
        workdir,
        best=_BEST.value,
        source=_SOURCE.value,
        validation=_VALIDATION.value,
        stage=_STAGE.value,
        scales=_SCALES.value,
        flip=_FLIP.value,
    )
    if _IMAGES.value:
        images = locate_local(_IMAGES.value, "--images")
        predictions = evaluation.predict_run(run, images, batch_size=_BATCH_SIZE.value, output=output)
    else:
        predictions = iter([evaluation.evaluate_run(run, probe=_PROBE.value, batch_size=_BATCH_SIZE.value)])
    for line, values in predictions:
        console.result(json.dumps(values) if _JSON.value else line)


if __name__ == "__main__":
    cli.run(main)
