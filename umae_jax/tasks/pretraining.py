"""Pre-training by masked image modelling: UM-MAE, MAE and SimMIM."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from umae_jax import pictures
from umae_jax.config import share_of_run, steps_of_epochs
from umae_jax.data.on_device import random_flip, sample_keys
from umae_jax.data.pipeline import Sample
from umae_jax.data.transforms import LoadCrop, first_readable
from umae_jax.errors import require
from umae_jax.files import AnyPath
from umae_jax.models.masked import MaskedImageModel
from umae_jax.progress import draw_progress
from umae_jax.tasks import labelled, next_steps, probing
from umae_jax.training.sharding import replicated
from umae_jax.training.task import BaseTask, Batch, Hook, Params, RunContext

PICTURES = "reconstructions"  # folder in a run's directory
PROGRESS_FILE = "progress.png"
PICTURES_PER_RUN = 20
KNN = "knn_top1"


class Task(BaseTask):
    """Trains a `MaskedImageModel` on images without labels; with labels it can also probe features during training."""

    command = "pretrain"
    accuracies = (KNN,)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the image alone, uint8 [H, W, C]."""
        return {"image": jax.ShapeDtypeStruct((*self.config.image_size, self.config.model.channels), jnp.uint8)}

    def loss(self, model: MaskedImageModel, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flip and mask each image with its own key, and return the model's loss, over the units not sampled."""
        with jax.named_scope("images"):
            keys = jax.vmap(jax.random.split)(sample_keys(self.config.seed, batch["sample_index"]))
            images, mask = random_flip(batch["image"], keys[:, 0]), model.sample_mask(keys[:, 1])
        return model(images, mask)[0], {}

    def open(self) -> None:
        """See `BaseTask.open`."""
        self.source = labelled.open_training(self.config)

    def prepare(self) -> None:
        """See `BaseTask.prepare`."""
        require(
            self.config.init is None,
            "init: pre-training starts from scratch; to continue from a weight file, convert it to a run directory "
            "with python -m umae_jax.convert FILE --workdir DIR, and continue that run",
        )
        self.validation = labelled.open_matching_validation(self.config, self.source)
        self.measured_last = KNN if self.validation and self.config.validation.every_epochs else None

    def sample_loader(self) -> Callable[[int, int], Sample]:
        """Return the function that loads a random resized crop."""
        config = self.config
        return LoadCrop(self.source, config.seed, config.image_size, config.model.channels, config.data.area)

    def hooks(self, context: RunContext) -> Sequence[Hook]:
        """Return the hooks that draw reconstructions and, with labelled validation images, probe with kNN."""
        hooks = []
        if picture_every := share_of_run(self.config.picture_every, context.total_steps, PICTURES_PER_RUN):
            hooks.append(Hook(picture_every, self._picture_hook(context)))
        if self.validation is not None:
            every = steps_of_epochs(self.config.validation.every_epochs, self.num_samples, self.config.batch_size)
            hooks.append(Hook(every, self._knn_probe(context), metric=KNN))
        return hooks

    def _picture_hook(self, context: RunContext) -> Callable[[int, Params], dict[str, float]]:
        """Return a function that draws reconstructions of the first images, always with the same masks."""
        config = self.config
        illustrate = pictures.make_illustrator(
            context.graph,
            first_readable(self.source, config.pictures, config.image_size, config.model.channels),
            seed=config.seed,
            sharding=replicated(context.mesh),
        )

        def draw(step: int, params: Params) -> dict[str, float]:
            context.show(step, PICTURES, illustrate(params, f"step {step}"))  # all processes must compute it
            return {}

        return draw

    def _knn_probe(self, context: RunContext) -> Callable[[int, Params], dict[str, float]]:
        """Return a function that measures the kNN accuracy of the frozen features."""
        config, validation = self.config, self.validation
        assert validation is not None
        batch_size = config.batch_size // config.grad_accum_steps
        extract = probing.FeatureReader(config, context.graph, context.params, context.mesh, batch_size, context.check)

        def probe(_step: int, params: Params) -> dict[str, float]:
            bank = extract(params, self.source, "data.source", config.probe.images)
            queries = extract(params, validation, "validation.source")
            options = {"neighbors": config.probe.neighbors, "temperature": config.probe.temperature}
            accuracy = probing.knn_accuracy(bank, queries, classes=len(self.source.classes), **options)
            unreadable = bank.unreadable + queries.unreadable
            return {KNN: accuracy} | ({"knn_unreadable": unreadable} if unreadable else {})

        return probe

    def result(self, workdir: AnyPath) -> str | None:
        """Return the path of the last picture."""
        drawn = sorted((workdir / PICTURES).glob("*.png"))
        return str(drawn[-1]) if drawn else None

    def pictures(self, workdir: AnyPath) -> dict[str, bytes]:
        """Return the reconstruction of the first images over time."""
        images = min(self.config.pictures, len(self.source))
        strip = draw_progress(workdir / PICTURES, self.config.image_size, images)
        return {PROGRESS_FILE: strip} if strip else {}

    def next_steps(self, workdir: AnyPath) -> dict[str, str]:
        """See `BaseTask.next_steps`."""
        return next_steps.after_pretraining(self.config, workdir)
