"""The compiled training steps of a run: one program for each shape of batches."""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from umae_jax.console import size
from umae_jax.data.pipeline import abstract_batch
from umae_jax.training.memory import device_bytes, step_bytes
from umae_jax.training.sharding import batch_sharding
from umae_jax.training.state import TrainState
from umae_jax.training.step import TrainStep, lower_step
from umae_jax.training.task import BaseTask, Batch

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(batch: Batch) -> Shapes:
    """Return the shapes of a batch, by which its program is found."""
    return tuple(sorted((name, array.shape) for name, array in batch.items()))


def global_batch(task: BaseTask, mesh: Mesh, arrays: Batch | None = None) -> Batch:
    """Return a batch in shapes, dtypes and shardings.

    Args:
        task: of the run.
        mesh: of devices.
        arrays: of one sample, one of `task.batches()`; None: the largest.
    """
    arrays = (task.batch() if arrays is None else arrays) | {"sample_index": jax.ShapeDtypeStruct((), np.uint32)}
    return abstract_batch(arrays, task.config.batch_size, batch_sharding(mesh))


def compile_programs(
    task: BaseTask, train_step: TrainStep, state: TrainState, mesh: Mesh
) -> dict[Shapes, jax.stages.Compiled]:
    """Compile a step for each shape of the task's batches; `state` holds shapes, dtypes and shardings."""
    batches = [global_batch(task, mesh, arrays) for arrays in task.batches()]
    return {shapes_of(batch): lower_step(train_step, state, batch, mesh).compile() for batch in batches}


def memory_of(programs: Iterable[jax.stages.Compiled], mesh: Mesh) -> str:
    """Return a line about the device memory that the compiler expects the largest step to need."""
    needed, available = max(map(step_bytes, programs)), device_bytes(mesh.devices.flat[0])
    return f"the step needs {size(needed)} of memory per device" + (f" of {size(available)}" if available else "")
