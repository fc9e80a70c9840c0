"""The plan of a run on a target: memory, speed and cost, from the compiler and the chip's specification."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ml_collections import ConfigDict

from umae_jax.config import check, resolve_steps
from umae_jax.console import GIB
from umae_jax.planning import parts
from umae_jax.planning.batch_search import STEP, find_max_batch
from umae_jax.planning.compiled import CompiledStats
from umae_jax.planning.parts import KernelBound, Passes
from umae_jax.planning.targets import OutOfMemory, Target, compile_for, lower_for

IMAGES_PER_CORE = 400.0  # decoded per second by a host core; a conservative figure, see docs/performance.md


@dataclass(frozen=True)
class Plan:
    """Estimates for one target. Values are per chip and per step unless noted; None means unknown.

    Attributes:
        target: name of the topology or of the local devices.
        num_chips: in the target.
        batch_per_chip: images; fractional if fewer images than chips.
        fits: whether the step fits in memory.
        reason: why it does not fit; "" if it does.
        max_batch_per_chip: the largest batch that fits, if searched for.
        memory: of a chip, bytes.
        argument_bytes, temp_bytes, peak_bytes: memory of the compiled step.
        bytes_accessed: moved to and from memory; None with gradient accumulation, as XLA counts loop bodies once.
        cycles, worst_case_cycles: scheduled by XLA:TPU; see `CompiledStats`.
        cycles_by_part, bytes_by_part: forward and backward pass, by part of the model.
        flops: counted before compilation.
        flops_by_part: of matrix products, by part.
        collectives: kind, group_size, count, bytes, seconds (at the links' full bandwidth).
        kernels: lower bounds of the Pallas kernels, by part and pass.
        scheduled_seconds: of `cycles`.
        flops_seconds, memory_seconds: of `flops` and `bytes_accessed` at the chip's peak.
        kernel_seconds, collective_seconds: lower bounds of all kernels and of all collectives.
        step_seconds: scheduled, kernel and collective seconds added up, without overlap.
        collective_share: of `step_seconds`.
        images_per_second: per chip.
        decoding_cores: host cores needed to decode the images, per chip.
        mfu: model FLOPs utilization, `flops_seconds / step_seconds`.
        total_steps: of the whole run.
        hours, chip_hours: of the whole run.
        compile_seconds: that planning took to lower and compile.
    """

    target: str
    num_chips: int
    batch_per_chip: float
    fits: bool
    reason: str
    max_batch_per_chip: int | None
    memory: float | None
    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    bytes_accessed: float | None
    cycles: int | None
    worst_case_cycles: int | None
    cycles_by_part: dict[str, Passes] | None
    bytes_by_part: dict[str, Passes] | None
    flops: float | None
    flops_by_part: dict[str, Passes]
    collectives: list[dict[str, Any]]
    kernels: dict[str, KernelBound]
    scheduled_seconds: float | None
    flops_seconds: float | None
    memory_seconds: float | None
    kernel_seconds: float | None
    collective_seconds: float | None
    step_seconds: float | None
    collective_share: float | None
    images_per_second: float | None
    decoding_cores: float | None
    mfu: float | None
    total_steps: int
    hours: float | None
    chip_hours: float | None
    compile_seconds: float


def make_plan(
    config: ConfigDict,
    target: Target,
    num_images: int,
    flops: float | None,
    matmul_flops: Mapping[str, int],
    report: Callable[[str], None],
    *,
    search: bool,
) -> Plan:
    """Compile the step of a configuration for a target and estimate the cost of the run.

    Args:
        config: of the run.
        target: to compile for.
        num_images: per epoch.
        flops: of a step on all chips together; None if unknown.
        matmul_flops: of matrix products on all chips together, by scope; may be empty.
        report: receives one line per batch that the search tries.
        search: whether to search for the largest batch.

    Raises:
        UserError: if the batch is not divisible among the chips.
    """
    num_chips, chip = len(target.devices), target.chip
    check(config, num_chips)
    start = time.monotonic()
    stats: CompiledStats | None = None
    reason = ""
    try:
        stats = compile_for(lower_for(config, target), target)
        known: dict[int, float] = {0: stats.argument_bytes, config.batch_size: stats.peak_bytes}
    except OutOfMemory as error:
        reason, known = str(error), {0: 0, config.batch_size: error.required}
    compile_seconds = time.monotonic() - start

    bytes_accessed = stats.bytes_accessed if stats and config.grad_accum_steps == 1 else None
    scheduled = stats.cycles / chip.clock if stats and stats.cycles and chip and chip.clock else None
    kernels = parts.kernel_bounds(stats.kernels, chip) if stats and chip else {}
    kernel_seconds = sum(bound.seconds for bound in kernels.values()) if stats and chip else None
    collectives = _collectives(stats, target)
    collective_seconds = _sum([one["seconds"] for one in collectives]) if stats else None
    step_seconds = _sum([scheduled, kernel_seconds, collective_seconds])
    flops_per_chip = flops / num_chips if flops else None
    flops_seconds = flops_per_chip / chip.peak_flops if flops_per_chip and chip else None
    batch_per_chip = config.batch_size / num_chips
    images_per_second = None if step_seconds is None else batch_per_chip / step_seconds
    total_steps = resolve_steps(config, "total", num_images, config.batch_size)
    hours = None if step_seconds is None else total_steps * step_seconds / 3600
    return Plan(
        target=target.name,
        num_chips=num_chips,
        batch_per_chip=batch_per_chip,
        fits=stats is not None,
        reason=reason,
        max_batch_per_chip=_search(config, target, known, report) if search and target.memory else None,
        memory=target.memory,
        argument_bytes=stats.argument_bytes if stats else None,
        temp_bytes=stats.temp_bytes if stats else None,
        peak_bytes=stats.peak_bytes if stats else None,
        bytes_accessed=bytes_accessed,
        cycles=stats.cycles if stats else None,
        worst_case_cycles=stats.worst_case_cycles if stats else None,
        cycles_by_part=parts.by_part(stats.cycles_by_scope) if stats and stats.cycles else None,
        bytes_by_part=parts.by_part(stats.bytes_by_scope) if stats and stats.cycles else None,
        flops=flops_per_chip,
        flops_by_part={
            name: Passes(passes.forward // num_chips, passes.backward // num_chips)
            for name, passes in parts.by_part(matmul_flops).items()
        },
        collectives=collectives,
        kernels=kernels,
        scheduled_seconds=scheduled,
        flops_seconds=flops_seconds,
        memory_seconds=bytes_accessed / chip.bandwidth if bytes_accessed and chip else None,
        kernel_seconds=kernel_seconds,
        collective_seconds=collective_seconds,
        step_seconds=step_seconds,
        collective_share=None if step_seconds is None else (collective_seconds or 0.0) / step_seconds,
        images_per_second=images_per_second,
        decoding_cores=None if images_per_second is None else images_per_second / IMAGES_PER_CORE,
        mfu=None if step_seconds is None or flops_seconds is None else flops_seconds / step_seconds,
        total_steps=total_steps,
        hours=hours,
        chip_hours=None if hours is None else hours * num_chips,
        compile_seconds=compile_seconds,
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """Return the sum, or None if any value is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _collectives(stats: CompiledStats | None, target: Target) -> list[dict[str, Any]]:
    described = []
    for collective in stats.collectives if stats else ():
        seconds = None
        if topology := target.topology:
            links = topology.links(collective.kind, collective.group_size)
            seconds = collective.seconds(topology.chip.link_bandwidth, links)
        described.append({**asdict(collective), "seconds": seconds})
    return described


def _search(config: ConfigDict, target: Target, known: Mapping[int, float], report: Callable[[str], None]) -> int:
    """Search for the largest batch per chip; `known` maps global batches to bytes, by `config` itself."""
    assert target.memory is not None
    memory, num_chips = target.memory, len(target.devices)
    trial = config.copy_and_resolve_references().unlock()
    trial.grad_accum_steps = 1

    def required_memory(batch: int) -> float:
        trial.batch_size = batch * num_chips
        try:
            needed: float = compile_for(lower_for(trial, target), target).peak_bytes
        except OutOfMemory as error:
            needed = error.required
        report(f"{target.name}: {batch} images per chip {'fit' if needed <= memory else 'do not fit'}")
        return needed

    start = config.batch_size // num_chips // config.grad_accum_steps
    comparable = config.grad_accum_steps == 1 and start % STEP == 0
    per_chip = {batch // num_chips: needed for batch, needed in known.items() if comparable or not batch}
    return find_max_batch(required_memory, memory, start, per_chip)


def table(plans: Sequence[Plan]) -> str:
    """Format plans as a table with one column per target."""
    rows: list[tuple[str, list[str]]] = [("", [plan.target for plan in plans])]

    def section(title: str) -> None:
        rows.append((title, []))

    def row(title: str, values: Sequence[str]) -> None:
        rows.append((title, list(values)))

    def number(title: str, field: str, scale: float, unit: str, digits: int = 1) -> None:
        row(f"  {title}", [_format(getattr(plan, field), scale, unit, digits) for plan in plans])

    has_kernels = any(plan.kernels for plan in plans)
    row("chips", [f"{plan.num_chips:,}" for plan in plans])
    row("batch per chip", [f"{plan.batch_per_chip:g}" for plan in plans])
    row("steps in total", [f"{plan.total_steps:,}" for plan in plans])
    section("From the compiler, per chip and step:")
    row("  fits in memory", ["yes" if plan.fits else f"no, {plan.reason}" for plan in plans])
    number("memory of the chip", "memory", GIB, " GiB", 2)
    number("peak memory", "peak_bytes", GIB, " GiB", 2)
    number("arguments", "argument_bytes", GIB, " GiB", 2)
    number("temporary memory", "temp_bytes", GIB, " GiB", 2)
    number("max batch per chip", "max_batch_per_chip", 1, "", 0)
    number("bytes accessed", "bytes_accessed", 1e9, " GB")
    number("scheduled, without collectives", "cycles", 1e6, " M cycles")
    if any(plan.cycles != plan.worst_case_cycles for plan in plans):
        number("scheduled, large attention logits", "worst_case_cycles", 1e6, " M cycles")
    if has_kernels:
        row("  Pallas kernel calls, not in the schedule", [str(_calls(plan)) for plan in plans])
    for key in sorted({_key(one) for plan in plans for one in plan.collectives}):
        found = [next((one for one in plan.collectives if _key(one) == key), None) for plan in plans]
        row(
            f"  {key[0]} over {key[1]} chips",
            ["-" if one is None else f"{one['count']}, {one['bytes'] / 1e6:,.1f} MB" for one in found],
        )
    section("From the program before compilation:")
    number("model FLOPs", "flops", 1e12, " TFLOP", 3)
    section("Estimated with the published figures of the chip:")
    number("scheduled, without collectives", "scheduled_seconds", 1e-3, " ms")
    number("model FLOPs at peak", "flops_seconds", 1e-3, " ms")
    number("bytes accessed at peak bandwidth", "memory_seconds", 1e-3, " ms")
    number("collectives at peak bandwidth", "collective_seconds", 1e-3, " ms", 2)
    if has_kernels:
        number("Pallas kernels, lower bound", "kernel_seconds", 1e-3, " ms", 2)
    step = "step: scheduled + kernels + collectives" if has_kernels else "step: scheduled + collectives"
    number(step, "step_seconds", 1e-3, " ms")
    number("images/s/chip", "images_per_second", 1, "", 0)
    number("MFU", "mfu", 0.01, "%")
    number("share of collectives", "collective_share", 0.01, "%")
    number("host cores for decoding per chip", "decoding_cores", 1, "")
    number("whole run", "hours", 1, " h")
    number("whole run, chip-hours", "chip_hours", 1, " h")

    title_width = max(len(title) for title, values in rows if values)
    width = max(12, *(len(value) for _, values in rows for value in values)) + 2
    lines = (title.ljust(title_width) + "".join(value.rjust(width) for value in values) for title, values in rows)
    return "\n".join(line.rstrip() for line in lines)


def _format(value: float | None, scale: float, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value / scale:,.{digits}f}{unit}"


def _key(collective: Mapping[str, Any]) -> tuple[str, int]:
    return collective["kind"], collective["group_size"]


def _calls(plan: Plan) -> int:
    return sum(bound.calls for bound in plan.kernels.values())


def part_tables(plan: Plan, target: Target) -> str:
    """Format the cost of each part of the model; empty if the compiler does not schedule cycles."""
    if not plan.cycles_by_part or target.chip is None:
        return ""
    moved, clock = plan.bytes_by_part or {}, target.chip.clock
    text = f"\n{plan.target}, cost of a step by part of the model:\n"
    text += parts.cost_table(plan.cycles_by_part, plan.flops_by_part, moved, clock)
    if plan.kernels:
        text += f"\n\n{plan.target}, lower bounds of Pallas kernels, not included above:\n"
        text += parts.kernel_table(plan.kernels)
    return text
