"""Object detection and instance segmentation, from a pre-trained encoder or another detector (DET)."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.config import steps_of_epochs
from umae_jax.data.annotations import AnnotatedSource
from umae_jax.data.dense_transforms import LoadInstances
from umae_jax.data.on_device import sample_keys
from umae_jax.data.pipeline import Groups, Sample
from umae_jax.detection.build import build_model
from umae_jax.detection.coco import write_results
from umae_jax.detection.detector import Detector, total_loss
from umae_jax.detection.mmdet import to_tensors
from umae_jax.detection.targets import Targets
from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath
from umae_jax.multihost import is_primary
from umae_jax.tasks import annotated, next_steps
from umae_jax.tasks.detecting import Results, make_evaluator
from umae_jax.tasks.detection_pictures import draw_examples, predict_objects
from umae_jax.tasks.detector_init import initial_params
from umae_jax.training.finish import warn_on_error
from umae_jax.training.task import BaseTask, Batch, Hook, Params, Prediction, RunContext
from umae_jax.weights.stored_run import StoredRun, best_checkpoint

COCO_IMAGES, COCO_CLASSES = 117_266, 80  # images with objects of train2017
BOX_AP, MASK_AP = "box_ap", "mask_ap"
DETECTIONS_FILE = "detections.json"
PICTURES = "detections"  # folder in a run's directory


class Task(BaseTask):
    """Trains a `Detector`; the best checkpoint is that of the highest box AP."""

    command = "detect"
    best_metric = BOX_AP
    accuracies = (BOX_AP, MASK_AP)
    source: AnnotatedSource

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        self.validation: AnnotatedSource | None = None
        self.results: Results | None = None  # of the last validation

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the arrays of `LoadInstances` in the largest canvas."""
        return annotated.training_arrays(self.config, annotated.canvases(self.config)[-1])

    def batches(self) -> Sequence[dict[str, jax.ShapeDtypeStruct]]:
        """See `BaseTask.batches`: landscape and portrait canvases of each size, those that the data need."""
        source = getattr(self, "source", None)  # a plan may have none
        orientations = (False, True) if source is None else tuple(np.unique(source.portrait).tolist())
        sizes = annotated.shapes(annotated.canvases(self.config), orientations)
        return [annotated.training_arrays(self.config, size) for size in sizes]

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """See `BaseTask.build_model`."""
        return build_model(self.config, rngs)

    def loss(self, model: Detector, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the sum of all losses, and each of them by name; samples are drawn with the key of each image."""
        keys = sample_keys(self.config.seed, batch["sample_index"])
        targets = Targets(
            boxes=batch["boxes"],
            labels=batch["labels"],
            valid=batch["box_valid"],
            masks=batch["masks"],
            mask_valid=batch["mask_valid"],
            semantic=batch.get("semantic"),
        )
        losses = model.losses(batch["image"], batch["image_size"], targets, keys)
        return total_loss(losses), losses

    def layer_index(self, model: Detector, name: str) -> tuple[int, int]:
        """See `BaseTask.layer_index`: FPN and heads are the last layer."""
        last = model.backbone.num_layers
        part, _, rest = name.partition(".")
        return (model.backbone.layer_index(rest), last) if part == "backbone" else (last, last)

    def assume_data(self) -> int:
        """See `BaseTask.assume_data`: COCO."""
        model = self.config.model
        model.classes = COCO_CLASSES if model.classes is None else model.classes
        model.masks = True if model.masks is None else model.masks
        return COCO_IMAGES

    def open(self) -> None:
        """See `BaseTask.open`; `model.classes` and `model.masks` are completed from the data."""
        config = self.config
        annotated.check_ranges(config)
        self.source = annotated.open_training(config)
        classes = len(self.source.classes)
        require(
            config.model.classes in (None, classes),
            f"model.classes is {config.model.classes}, but {config.data.source} has {classes} categories; "
            f"write --config.model.classes={classes}",
        )
        require(
            self.source.has_masks or not config.model.masks,
            f"model.masks: the annotations of {config.data.source} have boxes only; write --config.model.masks=False",
        )
        require(
            bool(config.model.semantic_classes) == (config.data.semantic is not None),
            "data.semantic: the semantic branch needs a folder of maps; name it, or write "
            "--config.model.semantic_classes=0"
            if config.model.semantic_classes
            else "model.semantic_classes: data.semantic has no use without the semantic branch; write the number of "
            "its classes, or leave data.semantic out",
        )
        if config.data.semantic is not None:
            annotated.check_semantic(config, self.source)
        config.model.classes = classes
        if config.model.masks is None:
            config.model.masks = self.source.has_masks
        if config.augment.copy_paste and not self.source.has_masks:
            console.say("augment.copy_paste needs masks; the annotations have boxes only, so nothing is pasted")
            config.augment.copy_paste = 0.0
        self.class_names = self.source.classes

    def prepare(self) -> None:
        """See `BaseTask.prepare`."""
        self.validation = annotated.open_validation(self.config, self.source, "validation.source")
        self.measured_last = BOX_AP if self.validation and self.config.validation.every_epochs else None

    @functools.cached_property
    def _groups(self) -> Groups | None:
        if all(height == width for height, width in annotated.canvases(self.config)):
            return None
        return Groups(self.source.portrait.astype(np.uint8).tobytes(), self.config.batch_size)

    @property
    def groups(self) -> Groups | None:
        """Landscape and portrait images, unless all canvases are square."""
        return self._groups

    def overview(self) -> dict[str, str]:
        """See `BaseTask.overview`."""
        config, counts = self.config, self.source.object_counts
        canvases = ", ".join(f"{height} x {width}" for height, width in annotated.canvases(config))
        transposed = "" if self.groups is None else " and transposed for portrait images"
        low, high = config.data.short_edge
        edges = f"large-scale jitter of {config.augment.jitter}" if config.augment.jitter else f"{low} to {high} pixels"
        return {
            "images": f"{len(self.source):,} in {config.data.source}",
            "objects": f"{counts.sum():,} of {len(self.source.classes):,} classes, up to {counts.max():,} per image",
            "validation": f"{len(self.validation):,} images in {config.validation.source}"
            if self.validation
            else "none",
            "canvases": f"{canvases}{transposed}; shorter edge: {edges}",
        }

    def sample_loader(self) -> Callable[[int, int], Sample]:
        """Return resized, flipped and pasted images with their objects."""
        config = self.config
        return LoadInstances(
            self.source,
            config.seed,
            config.batch_size,
            annotated.canvases(config),
            tuple(config.data.short_edge),
            max(config.image_size),
            None if config.augment.jitter is None else tuple(config.augment.jitter),
            config.augment.copy_paste,
            config.data.semantic,
        )

    def initial_params(self, abstract: Params) -> Params | None:
        """Return the encoder or the detector that `init` names."""
        return initial_params(self.config, abstract)

    def hooks(self, context: RunContext) -> Sequence[Hook]:
        """Return the hook that measures COCO's metrics on the validation images, and draws detections on the first."""
        config, validation = self.config, self.validation
        if validation is None or not config.validation.every_epochs:
            console.say("there are no validations: AP is not measured")
            return ()
        batch_size = annotated.eval_batch_size(context.mesh, config.batch_size // config.grad_accum_steps)
        measure = make_evaluator(
            *(config, context.graph, context.params, validation, context.mesh, batch_size, context.check)
        )

        def validate(step: int, params: Params) -> dict[str, float]:
            if step == 0:
                return {}  # an untrained detector finds nothing
            self.results = measure(params)
            if picture := draw_examples(self.results.examples, self.class_names):
                context.show(step, PICTURES, picture)
            metrics = {name: value for name, value in self.results.metrics.items() if "/" not in name and value >= 0}
            unreadable = self.results.unreadable
            return metrics | ({"validation_unreadable": unreadable} if unreadable else {})

        every = steps_of_epochs(config.validation.every_epochs, self.num_samples, config.batch_size)
        return (Hook(every, validate, metric=BOX_AP),)

    def result(self, workdir: AnyPath) -> str | None:
        """Print the last validation per class; return the best box AP and its checkpoint."""
        best = best_checkpoint(workdir)
        if self.results is not None and is_primary():
            console.say(f"AP per class, last validation:\n{self.results.table()}")
        return None if best is None else f"best box AP {best.value:.2%}, in {best.folder}"

    def next_steps(self, workdir: AnyPath) -> dict[str, str]:
        """See `BaseTask.next_steps`."""
        return next_steps.after_detection(self.config, workdir)

    def state_dict(self, params: Params) -> dict[str, np.ndarray]:
        """Return FPN, RPN and heads with the names of mmdet, and the backbone with those of the reference."""
        return to_tensors(self.config, params)

    def evaluate(self, run: StoredRun, mesh: Mesh, batch_size: int) -> Prediction:
        """Return COCO's metrics on the validation images, and write the detections into the run's directory.

        Raises:
            UserError: if the run names no validation images, or their categories are not the model's.
        """
        source = annotated.open_validation(run.config, None, "--validation")
        if source is None:
            raise UserError("--validation is missing; write --validation with coco:FOLDER or coco:JSON@IMAGES")
        require(
            source.classes == run.classes,
            f"--validation: its categories are {listing(source.classes)}, the model's {listing(run.classes)}; name "
            "annotations with the same categories",
        )
        batch_size = annotated.eval_batch_size(mesh, min(batch_size, len(source)))
        measure = make_evaluator(run.config, run.graph, run.params, source, mesh, batch_size, key="--validation")
        results = measure(run.params)
        if is_primary():
            console.say(f"AP per class, step {run.step:,}:\n{results.table()}")
            with warn_on_error(DETECTIONS_FILE):
                write_results(run.workdir / DETECTIONS_FILE, results.detections)
                console.say(f"wrote {len(results.detections):,} detections to {run.workdir / DETECTIONS_FILE}")
        line = ", ".join(
            f"{kind} AP {results.metrics[f'{kind}_ap']:.2%} (AP50 {results.metrics[f'{kind}_ap50']:.2%})"
            for kind in ("box", "mask")
            if f"{kind}_ap" in results.metrics
        )
        line += f" of {results.images:,} images"
        line += f"; {results.unreadable} unreadable images do not count" if results.unreadable else ""
        return line, {"step": run.step, "images": results.images, **results.metrics}

    def predict(
        self, run: StoredRun, path: Path, mesh: Mesh, batch_size: int, output: AnyPath | None
    ) -> Iterator[Prediction]:
        """Draw the detections of each image into a folder, and yield them."""
        return predict_objects(run, path, mesh, batch_size, output or run.workdir / PICTURES)
