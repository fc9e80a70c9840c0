"""The parts of a model that the time of a step goes to, by the named scopes of the models."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from umae_jax.planning.hardware import Chip
from umae_jax.planning.hlo import Kernel

_STAGE = re.compile(r"stage_(\d+)$")
_DETECTOR = ("pyramid", "fpn", "rpn", "proposals", "semantic", "box_head", "mask_head")
_PLACES = ("decoder", "loss", "optimizer", "images", *_DETECTOR)
_LAYERS = ("attention", "mlp", "merge", "patch_embedding", "sampling", "nms", "roi_align")
_TRANSFORMS = re.compile(r"\b(?:transpose|jvp|jit|vmap|checkpoint|rematted_computation)\(|\)")


class Passes(NamedTuple):
    """A count in the forward and in the backward pass."""

    forward: int
    backward: int


def part_of(scope: str) -> str:
    """Return the part of the model that an operation belongs to, such as "stage 1, attention".

    Args:
        scope: of the operation, such as "jit(train_step)/transpose(jvp(encoder))/stage_1/attention/dot_general".
    """
    names = _TRANSFORMS.sub("", scope).split("/")
    stage = next((f"stage {match[1]}" for name in names if (match := _STAGE.match(name))), None)
    place = stage or next((name for name in names if name in _PLACES), None)
    layer = next((name for name in reversed(names) if name in _LAYERS), None)
    parts = [part.replace("_", " ") for part in (place, layer) if part]
    return ", ".join(parts) or ("encoder" if "encoder" in names else "other")


def by_part(counts: Mapping[str, int]) -> dict[str, Passes]:
    """Sum counts by scope into counts by part of the model, largest first."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for scope, count in counts.items():
        (backward if _is_backward(scope) else forward)[part_of(scope)] += count
    names = sorted({*forward, *backward}, key=lambda name: -(forward[name] + backward[name]))
    return {name: Passes(forward[name], backward[name]) for name in names}


def _is_backward(scope: str) -> bool:
    return "transpose(" in scope


@dataclass(frozen=True)
class KernelBound:
    """A lower bound of the time of some Pallas kernels.

    Attributes:
        calls: number of calls.
        flops, transcendentals, bytes: totals over all calls.
        flops_seconds, memory_seconds: the time of these FLOPs and bytes at the chip's peak.
    """

    calls: int
    flops: int
    transcendentals: int
    bytes: int
    flops_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """Lower bound of the time, with compute and memory traffic fully overlapped."""
        return max(self.flops_seconds, self.memory_seconds)


def kernel_bounds(kernels: Mapping[Kernel, int], chip: Chip) -> dict[str, KernelBound]:
    """Bound the time of kernels by part of the model and pass, such as "stage 1, attention, forward".

    Args:
        kernels: number of calls of each.
        chip: that they run on.
    """
    totals: dict[str, Counter[str]] = {}
    for kernel, calls in kernels.items():
        name = f"{part_of(kernel.scope)}, {'backward' if _is_backward(kernel.scope) else 'forward'}"
        total = totals.setdefault(name, Counter())
        total["calls"] += calls
        for quantity in ("flops", "transcendentals", "bytes"):
            total[quantity] += calls * getattr(kernel, quantity)
    return {
        name: KernelBound(
            **total,
            flops_seconds=total["flops"] / chip.peak_flops,
            memory_seconds=total["bytes"] / chip.bandwidth,
        )
        for name, total in sorted(totals.items())
    }


def kernel_table(bounds: Mapping[str, KernelBound]) -> str:
    """Format the bounds of kernels as a table."""
    lines = [f"{'':34}{'calls':>8}{'GFLOP':>10}{'G exp':>8}{'GB':>8}{'FLOP, ms':>10}{'bytes, ms':>10}"]
    for name, bound in bounds.items():
        totals = f"{bound.flops / 1e9:10.1f}{bound.transcendentals / 1e9:8.2f}{bound.bytes / 1e9:8.2f}"
        times = f"{bound.flops_seconds * 1e3:10.2f}{bound.memory_seconds * 1e3:10.2f}"
        lines.append(f"{name:34}{bound.calls:8}{totals}{times}")
    return "\n".join(lines)


def cost_table(
    cycles: Mapping[str, Passes], flops: Mapping[str, Passes], moved: Mapping[str, Passes], clock: float
) -> str:
    """Format the cost of each part as a table: million cycles, share, milliseconds, GFLOP and GB.

    Args:
        cycles: scheduled, by part.
        flops: of matrix products, by part; empty if unknown.
        moved: bytes, by part.
        clock: cycles/s.
    """
    columns = f"{'forward':>10}{'backward':>10}{'total':>10}  M cycles{'share':>8}{'ms':>8}{'GFLOP':>10}{'GB':>8}"
    lines = [f"{'':24}{columns}"]
    step = sum(map(sum, cycles.values()))
    tables = [_with_total(counts) for counts in (cycles, flops, moved)]
    for name, passes in tables[0].items():
        total = sum(passes)
        numbers = "".join(f"{count / 1e6:10.2f}" for count in (*passes, total))
        gflop, gigabytes = (sum(counts.get(name, (0, 0))) / 1e9 for counts in tables[1:])
        numbers += f"{total / step:18.1%}{total / clock * 1e3:8.2f}"
        numbers += f"{gflop:10,.1f}" if flops else f"{'-':>10}"
        lines.append(f"{name:24}{numbers}{gigabytes:8.2f}")
    return "\n".join(lines)


def time_table(nanoseconds: Mapping[str, Passes]) -> str:
    """Format the measured time of each part as a table: milliseconds and share."""
    lines = [f"{'':24}{'forward':>10}{'backward':>10}{'total':>10}  ms{'share':>8}"]
    step = sum(map(sum, nanoseconds.values()))
    for name, passes in _with_total(nanoseconds).items():
        total = sum(passes)
        numbers = "".join(f"{spent / 1e6:10.2f}" for spent in (*passes, total))
        lines.append(f"{name:24}{numbers}{total / step:12.1%}")
    return "\n".join(lines)


def _with_total(counts: Mapping[str, Passes]) -> dict[str, Passes]:
    forward = sum(passes.forward for passes in counts.values())
    backward = sum(passes.backward for passes in counts.values())
    return {**counts, "all": Passes(forward, backward)}
