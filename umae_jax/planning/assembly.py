"""The step of a configuration as its run would take it, without a run: for plans and benchmarks."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.data.pipeline import Batch, abstract_batch
from umae_jax.training import finetuning, pretraining
from umae_jax.training.runs import Run, describe
from umae_jax.training.sharding import batch_sharding, make_mesh
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


def products_by_scope(config: ConfigDict) -> Counter[str]:
    """Operations of a step's matrix products on all chips together, by scope; that is nearly all of `count_flops`.

    Scopes are as in `compiled.CompiledStats`, but for the names of functions at their beginning. Empty if nothing
    tells.
    """
    counts: Counter[str] = Counter()
    mesh = _one_cpu()
    if mesh is None:
        return counts
    assembly = assemble(_without_kernels(config), mesh)

    def walk(jaxpr: Any, scope: str, times: int) -> None:  # noqa: ANN401 - Jaxpr, whose variables' types are vague
        for equation in jaxpr.eqns:
            here = f"{scope}/{equation.source_info.name_stack}"
            if equation.primitive.name == "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                counts[here] += times * 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in summed)
            inner = times * equation.params.get("length", 1)  # of a loop
            for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
                if isinstance(parameter, Jaxpr | ClosedJaxpr):
                    walk(getattr(parameter, "jaxpr", parameter), here, inner)

    walk(jax.make_jaxpr(assembly.step)(assembly.run.state, assembly.batch).jaxpr, "", 1)
    return counts


def _without_kernels(config: ConfigDict) -> ConfigDict:
    """The same operations, countable on any device."""
    config = config.copy_and_resolve_references()
    config.unlock()
    config.fused_attention = False
    return config


def _one_cpu() -> Mesh | None:
    """What programs are counted for, as the compilers for accelerators do not tell; None if JAX may not use the CPU."""
    try:
        return make_mesh(1, jax.local_devices(backend="cpu")[:1])
    except RuntimeError:
        return None


def count_flops(config: ConfigDict) -> float | None:
    """Operations of a step on all chips together, by the program before it is compiled; None if that cannot be told."""
    mesh = _one_cpu()
    if mesh is None:
        return None
    # A loop's body is counted once; the optimiser, outside it, is next to nothing.
    return (assemble(_without_kernels(config), mesh).lower().cost_analysis() or {}).get(
        "flops", 0.0
    ) * config.grad_accum_steps
