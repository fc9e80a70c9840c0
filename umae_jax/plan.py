"""Plan a run without its hardware: does it fit, how fast will it be, and what does the whole schedule cost?

    python -m umae_jax.plan --config configs/pretrain_swin_large.py --topology v5e:16x16 [--topology v6e:16x16 ...]

The real training step is compiled for each topology by the compiler that a TPU would use, on any x86-64 machine with
Linux (pip install "umae_jax[plan]"); without --topology, for the devices that are there.

    python -m umae_jax.plan --config CONFIG --topology v5e:2x2 --topology v5e:4x4 --growth FOLDER

shows instead how the cost of a step grows with the size of images, depth and batch, on the first topology, and from
each topology to the next.
"""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from umae_jax import cli
from umae_jax.config import check, resolve_steps
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError, require
from umae_jax.files import locate_here, write_whole
from umae_jax.planning import growth, parts
from umae_jax.planning.assembly import count_flops, products_by_scope
from umae_jax.planning.compiled import CompiledStats
from umae_jax.planning.hardware import GIB, GPUS, topology
from umae_jax.planning.parts import Bound
from umae_jax.planning.targets import (
    DoesNotFit,
    Target,
    compile_for,
    find_target,
    largest_batch,
    local_target,
    lower_for,
)
from umae_jax.training import finetuning
from umae_jax.training.metrics import duration

IMAGENET, CLASSES = 1_281_167, 1000  # training images and classes of ImageNet-1K
READ = 400  # images that a core of a host reads and crops a second, as the README has measured

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_multi_string("topology", [], "Such as v5e:16x16, or h100 where it is; several are compared.")
_IMAGES = flags.DEFINE_integer("images", None, "Images of an epoch, where the data are elsewhere.", lower_bound=1)
_LARGEST = flags.DEFINE_boolean("largest", True, "Search for the largest batch that fits; takes some compilations.")
_PARTS = flags.DEFINE_boolean(
    "parts", False, "Print how cycles, operations and bytes divide among the parts of the model."
)
_GROWTH = flags.DEFINE_string("growth", None, "A folder for growth.json and growth.png: show how cost grows instead.")
_JSON = flags.DEFINE_string("json", None, "A file to write the numbers to.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run on a target, a chip and a step where nothing else is said; None is not known.

    The compiler's: arguments, temp_bytes and peak (bytes of memory), bytes (moved to and from memory; where a
    batch is computed in parts it does not tell), cycles (scheduled, without collectives), parts (the same by part
    of the model, forward and backward), parts_bytes (operands and results of operations, likewise), collectives.
    RemoteError by kernels, into which the compiler does not look: kernels (what they must do at least, by part of the
    model and direction). Counted on the program before it is compiled: flops, parts_flops (of matrix products, by
    part). Estimated: scheduled (seconds of these cycles), flops_limit and bytes_limit (seconds at the chip's best),
    kernels_limit (the same of the kernels), interconnect (seconds that collectives take at the links' best), step
    (seconds, with nothing overlapped), communication (share of a step), reading_cores (of hosts, a chip), and the
    rest.
    """

    target: str
    chips: int
    batch: float
    fits: bool
    needs: str
    largest_batch: int | None
    memory: float | None
    arguments: int | None
    temp_bytes: int | None
    peak: int | None
    flops: float | None
    bytes: float | None
    cycles: int | None
    worst_case_cycles: int | None
    parts: dict[str, tuple[int, int]] | None
    parts_bytes: dict[str, tuple[int, int]] | None
    parts_flops: dict[str, tuple[int, int]]
    collectives: list[dict[str, Any]]
    kernels: dict[str, Bound]
    scheduled: float | None
    flops_limit: float | None
    bytes_limit: float | None
    kernels_limit: float | None
    interconnect: float | None
    step: float | None
    communication: float | None
    images_per_second: float | None
    reading_cores: float | None
    utilization: float | None
    steps: int
    hours: float | None
    chip_hours: float | None
    compile_seconds: float


def make_plan(
    config: ConfigDict,
    target: Target,
    images: int,
    flops: float | None,
    products: Mapping[str, int],
    *,
    search: bool,
) -> Plan:
    """Plan a run on a target.

    Args:
        config: of the run.
        target: what it is for.
        images: of an epoch.
        flops: of a step, on all chips together, if they are known.
        products: of these, those of matrix products by scope; empty where nobody asks for them.
        search: whether to search for the largest batch.

    Raises:
        UserError: if the batch does not divide among the chips.
    """
    chips = len(target.devices)
    check(config, chips)
    chip = target.chip
    start = time.monotonic()
    outcome: CompiledStats | DoesNotFit
    try:
        outcome = compile_for(lower_for(config, target), target)
    except DoesNotFit as answer:
        outcome = answer
    seconds = time.monotonic() - start
    told = outcome if isinstance(outcome, CompiledStats) else None
    scheduled = told.cycles / chip.clock if told and told.cycles and chip and chip.clock else None
    collectives: list[dict[str, Any]] = []
    for one in told.collectives if told else ():
        seconds_of = None
        if target.slice:
            seconds_of = one.seconds(target.slice.chip.link, target.slice.links(one.kind, one.devices))
        collectives.append({**dataclasses.asdict(one), "seconds": seconds_of})
    times = [one["seconds"] for one in collectives]
    interconnect = None if told is None or None in times else sum(times)
    kernels = parts.bounds(told.kernels, chip) if told and chip else {}
    kernels_limit = sum(bound.seconds for bound in kernels.values()) if told and chip else None
    estimates = scheduled, kernels_limit, interconnect
    step = None if None in estimates else sum(seconds for seconds in estimates if seconds)
    steps = resolve_steps(config, "total", images, config.batch_size)
    hours = None if step is None else steps * step / 3600
    flops_limit = flops / chips / chip.flops if flops and chip else None
    moved = told.bytes if told and config.grad_accum_steps == 1 else None  # which of them a loop repeats is not told
    bytes_limit = moved / chip.bandwidth if moved and chip else None
    return Plan(
        target=target.name,
        chips=chips,
        batch=config.batch_size / chips,
        fits=told is not None,
        needs="" if told else str(outcome),
        largest_batch=largest_batch(config, target, outcome, cli.say) if search and target.memory else None,
        memory=target.memory,
        arguments=told.arguments if told else None,
        temp_bytes=told.temp_bytes if told else None,
        peak=told.peak if told else None,
        flops=flops / chips if flops else None,
        bytes=moved,
        cycles=told.cycles if told else None,
        worst_case_cycles=told.worst_case_cycles if told else None,
        parts=parts.by_part(told.cycles_by_scope) if told and told.cycles else None,
        parts_bytes=parts.by_part(told.bytes_by_scope) if told and told.cycles else None,
        parts_flops={
            name: (forward // chips, backward // chips) for name, (forward, backward) in parts.by_part(products).items()
        },
        collectives=collectives,
        kernels=kernels,
        scheduled=scheduled,
        flops_limit=flops_limit,
        bytes_limit=bytes_limit,
        kernels_limit=kernels_limit,
        interconnect=interconnect,
        step=step,
        communication=None if step is None or interconnect is None else interconnect / step,
        images_per_second=None if step is None else config.batch_size / chips / step,
        reading_cores=None if step is None else config.batch_size / chips / step / READ,
        utilization=None if step is None or flops_limit is None else flops_limit / step,
        steps=steps,
        hours=hours,
        chip_hours=None if hours is None else hours * chips,
        compile_seconds=seconds,
    )


def _value(value: float | None, scale: float, unit: str, digits: int = 1) -> str:
    return "-" if value is None else f"{value / scale:,.{digits}f}{unit}"


def table(plans: Sequence[Plan]) -> str:
    """The plans side by side."""
    rows: list[tuple[str, list[str]]] = [("", [plan.target for plan in plans])]

    def row(title: str, *values: str) -> None:
        rows.append((title, list(values)))

    def section(title: str) -> None:
        rows.append((title, []))

    row("chips", *(f"{plan.chips:,}" for plan in plans))
    row("images a step and chip", *(f"{plan.batch:g}" for plan in plans))
    section("The compiler's own:")
    row("  fits", *("yes" if plan.fits else f"no, {plan.needs}" for plan in plans))
    row("  memory: arguments", *(_value(plan.arguments, GIB, " GiB", 2) for plan in plans))
    row("  memory: temp_bytes", *(_value(plan.temp_bytes, GIB, " GiB", 2) for plan in plans))
    row("  memory: peak", *(_value(plan.peak, GIB, " GiB", 2) for plan in plans))
    row("  memory of a chip", *(_value(plan.memory, GIB, " GiB", 2) for plan in plans))
    row("  largest batch a chip", *(_value(plan.largest_batch, 1, "", 0) for plan in plans))
    row("  bytes moved", *(_value(plan.bytes, 1e9, " GB") for plan in plans))
    row("  scheduled, without collectives", *(_value(plan.cycles, 1e6, " M cycles") for plan in plans))
    if any(plan.cycles != plan.worst_case_cycles for plan in plans):
        row(
            "  the same, logits of attention large",
            *(_value(plan.worst_case_cycles, 1e6, " M cycles") for plan in plans),
        )
    with_kernels = any(plan.kernels for plan in plans)
    if with_kernels:
        calls = [sum(bound.calls for bound in plan.kernels.values()) for plan in plans]
        row("  kernels, which it does not schedule", *map(str, calls))
    kinds = sorted({(one["kind"], one["devices"]) for plan in plans for one in plan.collectives})
    for kind, devices in kinds:
        found = [
            next((one for one in plan.collectives if (one["kind"], one["devices"]) == (kind, devices)), None)
            for plan in plans
        ]
        row(
            f"  {kind} over {devices}",
            *("-" if one is None else f"{one['count']} of {one['bytes'] / 1e6:,.1f} MB in all" for one in found),
        )
    section("Counted on the program before it is compiled:")
    row("  operations of a step", *(_value(plan.flops, 1e12, " TFLOP", 3) for plan in plans))
    section("Estimated from these and from what is published of the chip:")
    row("  scheduled, without collectives", *(_value(plan.scheduled, 1e-3, " ms") for plan in plans))
    row("  operations at the chip's best", *(_value(plan.flops_limit, 1e-3, " ms") for plan in plans))
    row("  bytes at the memory's best", *(_value(plan.bytes_limit, 1e-3, " ms") for plan in plans))
    row("  collectives at the links' best", *(_value(plan.interconnect, 1e-3, " ms", 2) for plan in plans))
    if with_kernels:
        row("  kernels at the chip's best", *(_value(plan.kernels_limit, 1e-3, " ms", 2) for plan in plans))
    row(
        "  step: scheduled" + (", kernels" if with_kernels else "") + " and collectives",
        *(_value(plan.step, 1e-3, " ms") for plan in plans),
    )
    row("  images/s/chip", *(_value(plan.images_per_second, 1, "", 0) for plan in plans))
    row("  share of the collectives", *(_value(plan.communication, 0.01, "%") for plan in plans))
    row("  host cores that read for a chip", *(_value(plan.reading_cores, 1, "") for plan in plans))
    row("  of the operations' best", *(_value(plan.utilization, 0.01, "%") for plan in plans))
    row("  steps of the schedule", *(f"{plan.steps:,}" for plan in plans))
    row("  hours", *(_value(plan.hours, 1, " h") for plan in plans))
    row("  chip-hours", *(_value(plan.chip_hours, 1, " h") for plan in plans))
    first = max(len(title) for title, values in rows if values)
    width = max(12, *(len(value) for _, values in rows for value in values)) + 2
    lines = (title.ljust(first) + "".join(value.rjust(width) for value in values) for title, values in rows)
    return "\n".join(line.rstrip() for line in lines)


def count_images(config: ConfigDict) -> int:
    """Images of an epoch: as told, as the data have, or ImageNet's; a classifier's classes likewise."""
    images = IMAGENET if _IMAGES.value is None else _IMAGES.value
    try:
        source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
    except UserError:
        cli.say(f"{config.data.source} is not here: counting on {images:,} images (see --images)")
        if config.model.method == "classifier" and config.model.classes is None:
            config.model.classes = CLASSES
        return images
    if config.model.method == "classifier":
        finetuning.name_classes(config, source)
    return len(source) if _IMAGES.value is None else images


def show_growth(config: ConfigDict, targets: Sequence[Target], folder: Path) -> None:
    """Compile what is varied, write and draw what was found, and print it."""
    require(
        importlib.util.find_spec("matplotlib") is not None,
        '--growth: what draws is missing; install it with pip install "umae_jax[plot]"',
    )
    settings = growth.settings(config, targets, cli.say)
    points = growth.measure(settings, folder / "costs", cli.say)
    write_whole(folder / "growth.json", growth.to_json(points).encode())
    title = f"{config.model.encoder}, {config.model.method}: around {settings[0]}"
    growth.draw(points, title, folder / "growth.png")
    cli.result(growth.table(points))
    cli.say(f"drawn in {folder / 'growth.png'}")


def main() -> None:
    """Plan, and print what was found."""
    config = cli.read_config(_CONFIG)
    for name in _TOPOLOGY.value:
        if name.lower() not in GPUS:
            topology(name)  # before the first takes its time
    path = locate_here(_JSON.value, "--json") if _JSON.value else None
    require(
        path is None or path.parent.is_dir(), f"--json: there is no folder for {path}; make it or name another file"
    )
    images = count_images(config)
    targets = [find_target(name) for name in _TOPOLOGY.value] or [local_target()]
    if _GROWTH.value:
        require(path is None and not _PARTS.value, "--growth writes growth.json, with parts; leave --json, --parts out")
        show_growth(config, targets, locate_here(_GROWTH.value, "--growth"))
        return
    plans = []
    for target in targets:
        check(config, len(target.devices))
    flops = count_flops(config)
    products: Mapping[str, int] = products_by_scope(config) if _PARTS.value else {}
    for target in targets:
        cli.say(f"{target.name}: compiling, which takes minutes for large models")
        plans.append(make_plan(config, target, images, flops, products, search=_LARGEST.value))
        cli.say(f"{target.name}: compiled in {duration(plans[-1].compile_seconds)}")
    cli.result(table(plans))
    for plan, target in zip(plans, targets, strict=True):
        if _PARTS.value and plan.parts and target.chip:
            cli.result(f"\n{plan.target}, the cycles of a step by part of the model:")
            cli.result(parts.table(plan.parts, target.chip.clock, plan.parts_flops, plan.parts_bytes or {}))
            if plan.kernels:
                cli.result(f"\n{plan.target}, what kernels must do at least, of which nothing is in the above:")
                cli.result(parts.table_of_bounds(plan.kernels))
    if path:
        numbers = [dataclasses.asdict(plan) for plan in plans]
        write_whole(path, (json.dumps(numbers, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
