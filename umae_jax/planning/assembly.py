"""The training step of a configuration without a run. Planning and benchmarking get their steps here only."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.errors import MissingDataError
from umae_jax.tasks import make_task
from umae_jax.training.programs import global_batch
from umae_jax.training.run import build_step
from umae_jax.training.state import AbstractRun, TrainState, abstract_run, initialize
from umae_jax.training.step import TrainStep, lower_step
from umae_jax.training.task import BaseTask, Batch


class Built(NamedTuple):
    """A training step and its inputs.

    Attributes:
        task: of the configuration, without data.
        run: the model, the optimizer, and the training state as shapes, dtypes and shardings.
        step: not compiled.
        batch: shapes, dtypes and shardings.
        mesh: of devices.
    """

    task: BaseTask
    run: AbstractRun
    step: TrainStep
    batch: Batch
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """Lower the step, ready to compile."""
        return lower_step(self.step, self.run.state, self.batch, self.mesh)

    def initialize(self) -> TrainState:
        """Return a freshly initialised training state on the devices."""
        return initialize(self.task, self.run)


def build(config: ConfigDict, mesh: Mesh) -> Built:
    """Build the training step of a configuration on a mesh.

    Raises:
        UserError: if the model's sizes are inconsistent.
    """
    task = make_task(config)
    run = abstract_run(task, mesh)
    step = build_step(task, run, warmup_steps=1, total_steps=2)  # the schedule's length does not change the cost
    return Built(task, run, step, global_batch(task, mesh), mesh)


def count_images(config: ConfigDict) -> tuple[int, bool]:
    """Return the number of training images, and whether the data are on this machine.

    A task with classes also completes `config`, from the data or from those that it assumes.

    Raises:
        UserError: if the data are damaged, or do not match the configuration.
    """
    config.unlock()
    task = make_task(config)
    try:
        task.open()
    except MissingDataError as error:
        if error.key != "data.source":
            raise
        return task.assume_data(), False
    return task.num_samples, True
