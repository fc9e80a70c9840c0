"""The training step of a configuration without a run. Planning and benchmarking get steps and data sizes here only."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.pipeline import Batch, abstract_batch
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError
from umae_jax.training import finetuning, pretraining
from umae_jax.training.runs import Run, describe
from umae_jax.training.sharding import batch_sharding
from umae_jax.training.step import TrainStep, lower_step
from umae_jax.training.trainer import build_step

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000  # of ImageNet-1K's training set


class Built(NamedTuple):
    """A training step and its inputs.

    Attributes:
        run: the model, the optimizer, and the train state as shapes, dtypes and shardings.
        step: not compiled.
        batch: shapes, dtypes and shardings.
        mesh: of devices.
    """

    run: Run
    step: TrainStep
    batch: Batch
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """Lower the step, ready to compile."""
        return lower_step(self.step, self.run.state, self.batch, self.mesh)


def build(config: ConfigDict, mesh: Mesh) -> Built:
    """Build the training step of a configuration on a mesh.

    Raises:
        UserError: if the model's sizes are inconsistent.
    """
    run = describe(config, mesh)
    make_loss = finetuning.make_loss if config.model.method == "classifier" else pretraining.make_loss
    # The length of the schedule does not change the cost of a step.
    step = build_step(config, run, make_loss(config, run.graph), warmup_steps=1, total_steps=2)
    return Built(run, step, abstract_batch(config, config.batch_size, batch_sharding(mesh)), mesh)


def count_images(config: ConfigDict) -> int | None:
    """Return the number of training images, or None if the data are not on this machine.

    For a classifier also sets `model.classes`, to ImageNet's number if it is unset and the data are not here.
    """
    classifier = config.model.method == "classifier"
    try:
        source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    except UserError:
        if classifier and config.model.classes is None:
            config.model.classes = IMAGENET_CLASSES
        return None
    if classifier:
        finetuning.name_classes(config, source)
    return len(source)
