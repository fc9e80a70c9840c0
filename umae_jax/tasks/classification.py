"""Classification: fine-tuning of a pre-trained encoder, or training from scratch (SPEC 8, 10)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax import console
from umae_jax.config import steps_of_epochs
from umae_jax.data.augment import RandAugment
from umae_jax.data.on_device import mix, random_erase, random_flip, sample_keys, smooth_targets
from umae_jax.data.pipeline import Sample
from umae_jax.data.sources import Source, open_images
from umae_jax.data.transforms import LoadCrop
from umae_jax.errors import UserError, listing, require
from umae_jax.features import read_encoder
from umae_jax.files import AnyPath, write_atomic
from umae_jax.models.classifier import Classifier
from umae_jax.multihost import is_primary
from umae_jax.tasks import labelled, next_steps, probing, splitting, stopping
from umae_jax.tasks.accuracy import Results, make_evaluator
from umae_jax.tasks.confusion import CONFUSION_FILE, draw_confusion
from umae_jax.tasks.initialization import adapt_pretrained, describe_loaded
from umae_jax.tasks.predicting import check_table, predict_images, write_csv
from umae_jax.training.finish import warn_on_error
from umae_jax.training.metrics import metric_history
from umae_jax.training.task import IMAGENET_IMAGES, BaseTask, Batch, Hook, Params, Prediction, RunContext
from umae_jax.weights.stored_run import StoredRun, best_checkpoint

IMAGENET_CLASSES = 1000
TOP1 = "validation_top1"
KNN = "knn_top1"


class Task(BaseTask):
    """Trains a `Classifier` by cross-entropy on augmented, mixed and smoothed labels."""

    command = "finetune"
    best_metric = TOP1
    accuracies = (TOP1,)

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        mixes = bool(config.augment.mixup or config.augment.cutmix)
        self.group_size = 2 if mixes else 1  # mixup and cutmix mix neighbours
        self.frozen = ("encoder.",) if config.freeze_encoder else ()
        self.validation: Source | None = None
        self.results: Results | None = None  # of the last validation

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return image uint8 [H, W, C] and label int32 []."""
        return labelled.sample_arrays(self.config)

    def loss(self, model: Classifier, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Augment each image with its own random keys; return the cross-entropy."""
        augment = self.config.augment
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(sample_keys(self.config.seed, batch["sample_index"]))
        flip, erase, mixing, drop = keys.swapaxes(0, 1)
        images = model.encoder.normalize(random_flip(batch["image"], flip))
        if augment.erase:
            images = random_erase(images, erase, augment.erase)
        if self.config.freeze_encoder:
            graph, params = nnx.split(model.encoder)
            model.encoder = nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))
        targets = smooth_targets(batch["label"], self.config.model.classes, augment.label_smoothing)
        images, targets = mix(images, targets, mixing, mixup=augment.mixup, cutmix=augment.cutmix)
        return optax.softmax_cross_entropy(model(images, drop), targets).mean(), {}

    def assume_data(self) -> int:
        """See `BaseTask.assume_data`: ImageNet-1K."""
        if self.config.model.classes is None:
            self.config.model.classes = IMAGENET_CLASSES
        return IMAGENET_IMAGES

    def resume(self, stored: ConfigDict) -> None:
        """Keep the split: no image that the run has trained on may validate now, and none that validated may train."""
        validation, before = self.config.validation, labelled.fraction_of(stored)
        if validation.source is not None:
            return
        require(
            before == 0 or stored.seed == self.config.seed,
            f"seed is {stored.seed} in this run, {self.config.seed} here; it decides which images validate, so "
            "set it back",
        )
        if validation.fraction != before:
            console.say(
                f"validation.fraction stays {before:g}, with which this run began, instead of {validation.fraction:g}"
            )
            validation.fraction = before

    def open(self) -> None:
        """See `BaseTask.open`; `model.classes` is set to the number of classes of the data."""
        config = self.config
        self.source, self.validation = labelled.open_both(config)
        labelled.check_labelled(self.source, "data.source")
        classes = len(self.source.classes)
        require(
            config.model.classes in (None, classes),
            f"model.classes is {config.model.classes}, but {config.data.source} has {classes} classes; "
            f"write --config.model.classes={classes}",
        )
        config.model.classes = classes
        self.class_names = tuple(self.source.classes)

    def prepare(self) -> None:
        """See `BaseTask.prepare`."""
        config = self.config
        self.measured_last = TOP1 if self.validation and config.validation.every_epochs else None
        if fraction := labelled.fraction_of(config):
            count = len(self.validation) if self.validation else 0
            console.say(
                f"validation.source is not set: {count:,} of {len(self.source) + count:,} images of data.source "
                f"validate and do not train (validation.fraction={fraction:g})"
            )
        if config.freeze_encoder and config.init is None:
            console.warn("freeze_encoder: init is not set, so the head is trained on a random encoder")
        require(
            config.early_stop is None or self.measured_last is not None,
            "early_stop: there are no validations; set validation.source or validation.fraction, and "
            "validation.every_epochs, or leave early_stop out",
        )

    def overview(self) -> dict[str, str]:
        """See `BaseTask.overview`."""
        validation = self.config.validation
        named = (
            validation.source or f"held out of data.source (validation.fraction={labelled.fraction_of(self.config):g})"
        )
        return {
            "classes": splitting.summarize_classes(self.source),
            "validation": f"{len(self.validation):,} images, {named}" if self.validation else "none",
            **({"frozen": "the encoder; only the head is trained"} if self.frozen else {}),
        }

    def sample_loader(self) -> Callable[[int, int], Sample]:
        """Return random resized crops under RandAugment, with labels."""
        config, augment = self.config, self.config.augment
        fill = tuple(round(255 * mean) for mean in config.data.mean)
        rand_augment = RandAugment(augment.operations, augment.magnitude, augment.magnitude_std, fill)
        return LoadCrop(
            self.source,
            config.seed,
            config.image_size,
            config.model.channels,
            config.data.area,
            rand_augment if augment.operations else None,
            labels=(config.model.classes, "data.source"),
        )

    def initial_params(self, abstract: Params) -> Params | None:
        """Return the pre-trained encoder that `init` names."""
        if self.config.init is None:
            console.say("init is not set: training from scratch")
            return None
        pretrained = read_encoder(self.config.init, "init")
        params = adapt_pretrained(self.config, abstract["encoder"], pretrained.config, pretrained.params)
        for line in describe_loaded(self.config, abstract, pretrained, params):
            console.say(line)
        return params

    def hooks(self, context: RunContext) -> Sequence[Hook]:
        """Return the hook that measures validation accuracy, before the first step also that of frozen features."""
        config, validation = self.config, self.validation
        if validation is None:
            console.say("there are no validation images: accuracy is not measured")
            return ()
        batch_size = config.batch_size // config.grad_accum_steps
        measure = make_evaluator(
            config,
            context.graph,
            context.params,
            validation,
            context.mesh,
            batch_size,
            context.check,
            self._validation_key,
        )

        def validate(step: int, params: Params) -> dict[str, float]:
            self.results = measure(params)
            accuracy = self.results.accuracy
            metrics = {TOP1: accuracy.top1, "validation_top5": accuracy.top5, "validation_images": accuracy.images}
            metrics |= {"validation_unreadable": accuracy.unreadable} if accuracy.unreadable else {}
            if step == 0 and config.init is not None:
                console.say("measuring kNN on the features of the encoder as it was loaded ...")
                metrics[KNN] = self._knn_accuracy(context, params, validation, batch_size)
                console.say(f"kNN on the features of the encoder as it was loaded: top-1 {metrics[KNN]:.2%}")
            return metrics

        every = steps_of_epochs(config.validation.every_epochs, self.num_samples, config.batch_size)
        return (Hook(every, validate, metric=TOP1),)

    def _knn_accuracy(self, context: RunContext, params: Params, validation: Source, batch_size: int) -> float:
        """Return the kNN accuracy of the encoder's features."""
        probe = self.config.probe
        read = probing.FeatureReader(
            self.config, context.graph, context.params, context.mesh, batch_size, context.check
        )
        bank = read(params, self.source, "data.source", probe.images)
        queries = read(params, validation, self._validation_key)
        options = {"neighbors": probe.neighbors, "temperature": probe.temperature}
        return probing.knn_accuracy(bank, queries, classes=len(self.source.classes), **options)

    @property
    def _validation_key(self) -> str:
        """Return the key that names the validation images, for error messages."""
        return "validation.source" if self.config.validation.source else "validation.fraction"

    def stop_reason(self, scores: Mapping[int, float]) -> str | None:
        """See `BaseTask.stop_reason`."""
        patience = self.config.early_stop
        return None if patience is None else stopping.stop_reason(scores, patience)

    def result(self, workdir: AnyPath) -> str | None:
        """Draw and print the last validation per class; return the best accuracy and its checkpoint."""
        best = best_checkpoint(workdir)
        if self.results is not None and best is not None:
            self._show_classes(self.results, self.class_names, workdir, "last validation")
            start = metric_history(workdir, KNN, 0).get(0)
            if start is not None and best.value < start:
                console.warn(
                    f"the best top-1, {best.value:.2%}, is below the {start:.2%} of kNN on the features that "
                    "fine-tuning started from: try another optimizer.base_learning_rate, weaker augment or more epochs"
                    + ("" if self.frozen else ", or freeze_encoder=True")
                )
        return None if best is None else f"best top-1 {best.value:.2%}, in {best.folder}"

    def next_steps(self, workdir: AnyPath) -> dict[str, str]:
        """See `BaseTask.next_steps`."""
        return next_steps.after_finetuning(self.config, workdir)

    def _show_classes(self, results: Results, classes: Sequence[str], workdir: AnyPath, title: str) -> None:
        """Print the table of classes, and draw the confusion matrix into the run's directory."""
        if not is_primary():
            return
        accuracy = results.accuracy
        console.say(f"top-1 per class, {title}:\n{results.table(classes)}")
        title = f"{title}: top-1 {accuracy.top1:.2%} of {accuracy.images:,} images"
        with warn_on_error(CONFUSION_FILE):
            write_atomic(workdir / CONFUSION_FILE, draw_confusion(results, classes, title))
            console.say(f"the confusion matrix is in {workdir / CONFUSION_FILE}")

    def evaluate(self, run: StoredRun, mesh: Mesh, batch_size: int) -> Prediction:
        """Return top-1 and top-5 accuracy on the validation images.

        Raises:
            UserError: if the run names no validation images, or their classes are not the model's.
        """
        config, name = run.config, run.config.validation.source
        if labelled.fraction_of(config):
            _, source = labelled.open_both(config)
            name = f"part of {config.data.source}"
        else:
            source = None if name is None else labelled.open_validation(config, "--validation")
        if source is None:
            raise UserError("--validation is missing; write --validation with folder:PATH or tfds:NAME")
        require(
            len(source.classes) == config.model.classes,
            f"--validation: {name} has {len(source.classes)} classes, the model {config.model.classes}",
        )
        unknown = [theirs for ours, theirs in zip(run.classes, source.classes, strict=False) if ours != theirs]
        require(
            not unknown,
            f"--validation: the model was not trained on these classes of {name}: {listing(unknown)}; "
            "name images of its own classes",
        )
        evaluate = make_evaluator(config, run.graph, run.params, source, mesh, batch_size, key="--validation")
        results = evaluate(run.params)
        accuracy = results.accuracy
        self._show_classes(results, source.classes, run.workdir, f"{name}, step {run.step:,}")
        line = f"top-1 {accuracy.top1:.2%}, top-5 {accuracy.top5:.2%} of {accuracy.images:,} images"
        line += f"; {accuracy.unreadable} unreadable images do not count" if accuracy.unreadable else ""
        return line, {"step": run.step, **accuracy._asdict(), "classes": results.per_class(source.classes)}

    def predict(
        self, run: StoredRun, path: Path, mesh: Mesh, batch_size: int, output: AnyPath | None
    ) -> Iterator[Prediction]:
        """Yield the most probable classes of each image and their probabilities, or write them to a CSV file."""
        check_table(output)
        source = open_images(path)
        source.max_pixels = run.config.data.max_pixels
        predictions = predict_images(run, source, mesh, batch_size)
        return predictions if output is None else iter([write_csv(predictions, output)])
