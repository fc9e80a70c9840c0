"""Classification: fine-tuning of a pre-trained encoder, or training from scratch (SPEC 8, 10)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from umae_jax.data.transforms import LoadCentralCrop, LoadCrop, Unreadable
from umae_jax.errors import listing, require
from umae_jax.features import read_encoder
from umae_jax.files import AnyPath
from umae_jax.models.classifier import Classifier
from umae_jax.models.positions_table import fixed_positions, resize_positions
from umae_jax.tasks import labelled, next_steps
from umae_jax.training.sharding import replicated
from umae_jax.training.task import BaseTask, Batch, Hook, Params, Prediction, RunContext
from umae_jax.weights.stored_run import StoredRun, best_checkpoint

TOP1 = "validation_top1"
NUM_PREDICTED = 5  # classes named per image


class Accuracy(NamedTuple):
    """Accuracy on a data set."""

    images: int  # number of readable images; unreadable ones do not count
    top1: float  # fraction whose class has the highest logit
    top5: float  # fraction whose class is among the five highest logits
    unreadable: int  # number of unreadable images


class Task(BaseTask):
    """Trains a `Classifier` by cross-entropy on augmented, mixed and smoothed labels."""

    command = "finetune"
    best_metric = TOP1
    accuracies = (TOP1,)

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        mixes = bool(config.augment.mixup or config.augment.cutmix)
        self.group_size = 2 if mixes else 1  # mixup and cutmix mix neighbours

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
        targets = smooth_targets(batch["label"], self.config.model.classes, augment.label_smoothing)
        images, targets = mix(images, targets, mixing, mixup=augment.mixup, cutmix=augment.cutmix)
        return optax.softmax_cross_entropy(model(images, drop), targets).mean(), {}

    def assume_classes(self, classes: int) -> None:
        """See `BaseTask.assume_classes`."""
        if self.config.model.classes is None:
            self.config.model.classes = classes

    def open(self) -> None:
        """See `BaseTask.open`; `model.classes` is set to the number of classes of the data."""
        config = self.config
        self.source = labelled.open_training(config)
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
        self.validation = labelled.open_matching_validation(config, self.source)
        self.measured_last = TOP1 if self.validation and config.validation.every_epochs else None

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
        pretrained, encoder = read_encoder(self.config.init, "init")
        return adapt_pretrained(self.config, abstract["encoder"], pretrained, encoder)

    def hooks(self, context: RunContext) -> Sequence[Hook]:
        """Return the hook that measures validation accuracy."""
        config = self.config
        if self.validation is None:
            console.say("validation.source is not set: accuracy is not measured")
            return ()
        batch_size = config.batch_size // config.grad_accum_steps
        measure = make_evaluator(
            config, context.graph, context.params, self.validation, context.mesh, batch_size, context.check
        )

        def validate(_step: int, params: Params) -> dict[str, float]:
            accuracy = measure(params)
            metrics = {TOP1: accuracy.top1, "validation_top5": accuracy.top5, "validation_images": accuracy.images}
            return metrics | ({"validation_unreadable": accuracy.unreadable} if accuracy.unreadable else {})

        every = steps_of_epochs(config.validation.every_epochs, self.num_samples, config.batch_size)
        return (Hook(every, validate, metric=TOP1),)

    def result(self, workdir: AnyPath) -> str | None:
        """Return the best accuracy and its checkpoint."""
        best = best_checkpoint(workdir)
        return None if best is None else f"best top-1 {best.value:.2%}, in {best.folder}"

    def next_steps(self, workdir: AnyPath) -> dict[str, str]:
        """See `BaseTask.next_steps`."""
        return next_steps.after_finetuning(self.config, workdir)

    def evaluate(self, run: StoredRun, mesh: Mesh, batch_size: int) -> Prediction:
        """Return top-1 and top-5 accuracy on the validation images.

        Raises:
            UserError: if the run names no validation images, or their classes are not the model's.
        """
        config, name = run.config, run.config.validation.source
        require(name is not None, "--validation is missing; write --validation with folder:PATH or tfds:NAME")
        source = labelled.open_validation(config, "--validation")
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
        accuracy = make_evaluator(config, run.graph, run.params, source, mesh, batch_size)(run.params)
        line = f"top-1 {accuracy.top1:.2%}, top-5 {accuracy.top5:.2%} of {accuracy.images:,} images"
        line += f"; {accuracy.unreadable} unreadable images do not count" if accuracy.unreadable else ""
        return line, {"step": run.step, **accuracy._asdict()}

    def predict(self, run: StoredRun, path: Path) -> Iterator[Prediction]:
        """Yield the most probable classes of each image and their probabilities."""
        config, source = run.config, open_images(path)
        names = run.classes or [f"class {number}" for number in range(config.model.classes)]

        @jax.jit
        def probabilities(params: Params, images: jax.Array) -> jax.Array:
            return jax.nn.softmax(nnx.merge(run.graph, params)(images))

        failures = 0
        load = LoadCentralCrop(source, config.image_size, config.model.channels, config.validation.crop)
        for index in range(len(source)):
            loaded = load.try_load(index)
            if isinstance(loaded, Unreadable):
                failures += 1
                console.say(f"{loaded.name} cannot be read ({loaded.reason})")
                continue
            (name, _, _), pixels = loaded
            values = np.asarray(probabilities(run.params, jnp.asarray(pixels[None])))[0]
            classes = {names[k]: float(values[k]) for k in np.argsort(-values)[:NUM_PREDICTED]}
            line = ", ".join(f"{label} {value:.1%}" for label, value in classes.items())
            yield f"{name}: {line}", {"image": name, "classes": classes}
        require(failures < len(source), f"--images: none of the images in {path} can be read")


def rank_of(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Count the classes ranked above the true one: labels int32 [B], logits [B, classes] -> int32 [B].

    Among equal logits the lower class ranks first. A NaN never improves the rank of the true class.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=1)  # [B, 1]
    classes = jnp.arange(logits.shape[1])[None]
    behind = (logits < true) | ((logits == true) & (classes > labels[:, None]))
    return logits.shape[1] - 1 - behind.sum(1, dtype=jnp.int32)


def make_evaluator(
    config: ConfigDict,
    graph: nnx.GraphDef,
    params: Params,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> Callable[[Params], Accuracy]:
    """Compile the evaluation of a classifier on every image of a source, each counted once.

    In bfloat16 the logits, and so the order of two nearly equal classes, can depend on the batch size.

    Args:
        config, graph: of the classifier.
        params: its parameters, or their shapes with shardings.
        source: labelled images.
        mesh: the devices.
        batch_size: global.
        check: called before each batch; may raise to stop the evaluation.
    """
    loader = labelled.eval_loader(config, source, "validation.source", mesh, batch_size, None, set())

    def count(params: Params, batch: Batch) -> jax.Array:
        valid = batch["valid"]
        rank = rank_of(jnp.maximum(batch["label"], 0), nnx.merge(graph, params)(batch["image"]))
        return jnp.stack([valid.sum(), (valid & (rank < 1)).sum(), (valid & (rank < 5)).sum()])

    jitted = jax.jit(count, out_shardings=replicated(mesh))
    compiled = jitted.lower(params, labelled.abstract_eval_batch(config, mesh, batch_size)).compile()

    def evaluate(params: Params) -> Accuracy:
        counts = []
        for batch in loader:
            check()
            counts.append(compiled(params, batch))
        images, top1, top5 = np.sum(jax.device_get(counts), axis=0).tolist()
        require(images > 0, "validation.source: none of its images can be read; repair them or name another source")
        return Accuracy(images, top1 / images, top5 / images, len(source) - images)

    return evaluate


def adapt_pretrained(config: ConfigDict, abstract: Params, pretrained: ConfigDict, encoder: nnx.State) -> Params:
    """Return the classifier's parameters {"encoder": ...} from a pre-trained encoder, on the host.

    Position tables are resized if the image size differs from that of pre-training.

    Args:
        config: of the classifier; `config.init` names the encoder in the error message.
        abstract: the classifier's encoder, in shapes; parameters that it lacks, such as a final norm, are dropped.
        pretrained: configuration of the pre-trained model.
        encoder: parameters of its encoder.

    Raises:
        UserError: naming the sizes that differ.
    """
    keys = ["encoder", "channels", "patch", "widths", "depths", "heads", "mlp_ratios"]
    keys += ["position_width"] if "position_width" in config.model else []
    pairs = [(f"model.{key}", pretrained.model.get(key), config.model[key]) for key in keys]
    different = [f"{key} is {theirs}, not {ours}" for key, theirs, ours in pairs if theirs != ours]
    require(
        not different,
        f"init: {config.init} holds an encoder of other sizes ({'; '.join(different)}); "
        "choose a configuration of its sizes, or set these keys",
    )
    variables, shapes = dict(nnx.to_flat_state(encoder)), dict(nnx.to_flat_state(abstract))
    table = ("positions", "table")
    if table in shapes:
        side, width = config.model.patch, config.model.widths[0]
        grids = [(image[0] // side, image[1] // side) for image in (pretrained.image_size, config.image_size)]
        leading = shapes[table].shape[1] - grids[1][0] * grids[1][1]  # 1 with a class token
        fixed = fixed_positions(width, grids[0], leading)
        learned = jnp.asarray(variables[table][...] if table in variables else fixed)
        variables[table] = nnx.Param(np.asarray(resize_positions(learned, *grids, leading=leading)))
    return nnx.State({"encoder": nnx.from_flat_state([(path, variables[path]) for path in shapes])})
