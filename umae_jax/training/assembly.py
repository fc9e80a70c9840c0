"""The step of a configuration as its run would take it, without a run: for plans and benchmarks."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.loader import Batch, abstract_batch
from umae_jax.training import finetuning, pretraining
from umae_jax.training.mesh import batch_sharding, make_mesh
from umae_jax.training.runs import Run, describe
from umae_jax.training.step import TrainStep, lower_step
from umae_jax.training.trainer import build_step


class Assembly(NamedTuple):
    """A step and what it takes.

    Attributes:
        run: the model and its state, in shapes.
        step: not yet compiled.
        batch: shapes and shardings.
        mesh: of devices.
    """

    run: Run
    step: TrainStep
    batch: Batch
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """The step ready to be compiled."""
        return lower_step(self.step, self.run.state, self.batch, self.mesh)


def assemble(config: ConfigDict, mesh: Mesh) -> Assembly:
    """Put the step of a configuration together, on a mesh.

    Raises:
        UserError: if the model's numbers do not fit together.
    """
    run = describe(config, mesh)
    make_loss = finetuning.make_loss if config.model.method == "classifier" else pretraining.make_loss
    # The numbers of the schedule change nothing.
    step = build_step(config, run, make_loss(config, run.graph), warmup_steps=1, total_steps=2)
    return Assembly(run, step, abstract_batch(config, config.batch_size, batch_sharding(mesh)), mesh)


def count_flops(config: ConfigDict) -> float | None:
    """Operations of a step on all chips together, by the program before it is compiled; None if that cannot be told."""
    try:
        mesh = make_mesh(1, jax.local_devices(backend="cpu")[:1])
    except RuntimeError:  # JAX has been kept from using the CPU, and the compilers for accelerators do not tell
        return None
    config = config.copy_and_resolve_references()
    config.unlock()
    config.fused_attention = False  # the same operations, and not for the CPU
    # A loop's body is counted once; the optimiser, outside it, is next to nothing.
    return (assemble(config, mesh).lower().cost_analysis() or {}).get("flops", 0.0) * config.accumulate
