"""FLOPs of a training step, counted on the traced program, before the compiler changes it."""

import math
from collections import Counter
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh
from ml_collections import ConfigDict

from umae_jax.planning.assembly import Built, build
from umae_jax.training.sharding import make_mesh


def count_flops(config: ConfigDict) -> float | None:
    """Return the FLOPs of a step on all devices together, or None if JAX may not use the CPU.

    Work that `rematerialize` repeats in the backward pass is counted as often as it runs.
    """
    built = _build_countable(config)
    if built is None:
        return None
    costs = built.lower().cost_analysis() or {}
    # XLA counts the body of the accumulation loop once. The optimizer is outside the loop, but its share is negligible.
    return costs.get("flops", 0.0) * config.grad_accum_steps


def matmul_flops_by_scope(config: ConfigDict) -> Counter[str]:
    """Return the FLOPs of matrix products on all devices together, by scope; nearly all of `count_flops`.

    Scopes are those of `compiled.CompiledStats` without the leading function names. Empty if JAX may not use the CPU.
    """
    flops: Counter[str] = Counter()
    built = _build_countable(config)
    if built is None:
        return flops

    def visit(jaxpr: Any, scope: str, repeats: int) -> None:  # noqa: ANN401 - Jaxpr, whose variables are typed loosely
        for equation in jaxpr.eqns:
            inner_scope = f"{scope}/{equation.source_info.name_stack}"
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                size = equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
                flops[inner_scope] += repeats * 2 * size
            inner_repeats = repeats * equation.params.get("length", 1)  # of a scan
            for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
                if isinstance(parameter, Jaxpr | ClosedJaxpr):
                    visit(getattr(parameter, "jaxpr", parameter), inner_scope, inner_repeats)

    visit(jax.make_jaxpr(built.step)(built.run.state, built.batch).jaxpr, "", 1)
    return flops


def _build_countable(config: ConfigDict) -> Built | None:
    """Build the step for one CPU and without Pallas kernels: compilers for accelerators do not count FLOPs."""
    mesh = _one_cpu()
    if mesh is None:
        return None
    config = config.copy_and_resolve_references().unlock()
    config.fused_attention = False
    return build(config, mesh)


def _one_cpu() -> Mesh | None:
    try:
        return make_mesh(1, jax.local_devices(backend="cpu")[:1])
    except RuntimeError:
        return None
