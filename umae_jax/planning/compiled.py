"""Statistics of a compiled step: memory, cycles, traffic and collectives."""

from typing import Any, NamedTuple

import jax

from umae_jax.console import warn
from umae_jax.planning.hlo import Collective, Kernel, read_program
from umae_jax.training.memory import step_bytes


class CompiledStats(NamedTuple):
    """Statistics of a compiled program, per device.

    Attributes:
        argument_bytes: memory of the arguments.
        temp_bytes: temporary memory.
        peak_bytes: peak memory; donated arguments count once.
        bytes_accessed: bytes moved between memory and chip, from XLA's cost analysis.
        cycles: cycles scheduled by XLA:TPU, without collectives, Pallas kernels and `lax.cond` branches; None on
            other platforms.
        worst_case_cycles: `cycles` and the longest branch of each `lax.cond`. Attention has one, depending on the
            size of the logits; its shorter branch does nothing.
        cycles_by_scope: `cycles` by the scope of the operation.
        bytes_by_scope: bytes of operands and results by the scope of the operation; their sum is only close to
            `bytes_accessed`.
        collectives: collective operations between devices.
        kernels: number of calls of each Pallas kernel.
    """

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    bytes_accessed: float
    cycles: int | None
    worst_case_cycles: int | None
    cycles_by_scope: dict[str, int]
    bytes_by_scope: dict[str, int]
    collectives: tuple[Collective, ...]
    kernels: dict[Kernel, int]


def analyze(compiled: jax.stages.Compiled, num_devices: int) -> CompiledStats:
    """Collect the statistics of a compiled program that runs on `num_devices` devices."""
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    program = read_program(_read_text(compiled), num_devices)
    return CompiledStats(
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=step_bytes(compiled),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        cycles=program.cycles.total() or None,
        worst_case_cycles=program.worst_case_cycles or None,
        cycles_by_scope=dict(program.cycles),
        bytes_by_scope=dict(program.bytes),
        collectives=program.collectives,
        kernels=dict(program.kernels),
    )


def _read_text(compiled: jax.stages.Compiled) -> str:
    """Return the text of a compiled program; "" and a warning if JAX's XLA cannot read a program of libtpu's."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        warn("the compiled program cannot be read: no cycles, collectives or kernels are known")
        return ""
