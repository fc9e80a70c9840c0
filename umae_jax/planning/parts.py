"""Which part of a model the time of a step goes to, by the scopes that models name."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from umae_jax.planning.compiled import Kernel
from umae_jax.planning.hardware import Chip

_STAGE = re.compile(r"stage_(\d+)$")
_PLACES = ("decoder", "loss", "optimizer", "images")
_LAYERS = ("attention", "mlp", "merge", "patch_embedding")
_TRANSFORMS = re.compile(r"\b(?:transpose|jvp|jit|vmap|checkpoint|rematted_computation)\(|\)")


def part_of(scope: str) -> str:
    """The part of the model that an operation belongs to, such as "stage 1, attention".

    Args:
        scope: of the operation, such as "jit(train_step)/transpose(jvp(encoder))/stage_1/attention/dot_general".
    """
    names = _TRANSFORMS.sub("", scope).split("/")
    stage = next((f"stage {found[1]}" for name in names if (found := _STAGE.match(name))), None)
    place = stage or next((name for name in names if name in _PLACES), None)
    layer = next((name for name in reversed(names) if name in _LAYERS), None)
    parts = [part.replace("_", " ") for part in (place, layer) if part]
    return ", ".join(parts) or ("encoder" if "encoder" in names else "other")


def by_part(counts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Cycles or other counts by scope to those by part of the model, forward and backward, the most first."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for scope, count in counts.items():
        (backward if "transpose(" in scope else forward)[part_of(scope)] += count
    names = sorted({*forward, *backward}, key=lambda name: -(forward[name] + backward[name]))
    return {name: (forward[name], backward[name]) for name in names}


@dataclass(frozen=True)
class Bound:
    """What kernels must do at least.

    Attributes:
        calls: how many there are.
        flops, transcendentals, bytes: of all of them.
        flops_limit, bytes_limit: seconds at the chip's best.
    """

    calls: int
    flops: int
    transcendentals: int
    bytes: int
    flops_limit: float
    bytes_limit: float

    @property
    def seconds(self) -> float:
        """The least that they take, if operations and bytes overlap."""
        return max(self.flops_limit, self.bytes_limit)


def bounds(kernels: Mapping[Kernel, int], chip: Chip) -> dict[str, Bound]:
    """What kernels must do at least by part of the model and direction, such as "stage 1, attention, forward"."""
    sums: dict[str, Counter[str]] = {}
    for kernel, calls in kernels.items():
        direction = "backward" if "transpose(" in kernel.scope else "forward"
        counts = {"calls": 1, **kernel._asdict()}
        del counts["scope"]
        here = sums.setdefault(f"{part_of(kernel.scope)}, {direction}", Counter())
        here.update({name: calls * count for name, count in counts.items()})
    return {
        name: Bound(**count, flops_limit=count["flops"] / chip.flops, bytes_limit=count["bytes"] / chip.bandwidth)
        for name, count in sorted(sums.items())
    }


def table_of_bounds(bounds: Mapping[str, Bound]) -> str:
    """Calls, billions of operations, exponentials and bytes, and milliseconds at the chip's best."""
    lines = [f"{'':34}{'calls':>8}{'GFLOP':>10}{'G exp':>8}{'GB':>8}{'FLOP, ms':>10}{'bytes, ms':>10}"]
    for name, one in bounds.items():
        numbers = f"{one.flops / 1e9:10.1f}{one.transcendentals / 1e9:8.2f}{one.bytes / 1e9:8.2f}"
        lines.append(f"{name:34}{one.calls:8}{numbers}{one.flops_limit * 1e3:10.2f}{one.bytes_limit * 1e3:10.2f}")
    return "\n".join(lines)


def table(
    cycles: Mapping[str, tuple[int, int]],
    clock: float,
    flops: Mapping[str, tuple[int, int]],
    moved: Mapping[str, tuple[int, int]],
) -> str:
    """What each part costs: million cycles, their share, milliseconds; billions of operations and of bytes.

    Args:
        cycles: by part, forward and backward.
        clock: cycles a second.
        flops: operations of matrix products, likewise; empty if they are not known.
        moved: bytes, likewise.
    """

    def whole(counts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        return sum(forward for forward, _ in counts.values()), sum(backward for _, backward in counts.values())

    total = sum(whole(cycles))
    units = f"{'share':>8}{'ms':>8}{'GFLOP':>10}{'GB':>8}"
    lines = [f"{'':24}{'forward':>10}{'backward':>10}{'together':>10}  M cycles{units}"]
    tables = [{**counts, "all": whole(counts)} for counts in (cycles, flops, moved)]
    for name, (forward, backward) in tables[0].items():
        both = forward + backward
        numbers = "".join(f"{count / 1e6:10.2f}" for count in (forward, backward, both))
        operations, size = (sum(counts.get(name, (0, 0))) / 1e9 for counts in tables[1:])
        times = f"{both / total:18.1%}{both / clock * 1e3:8.2f}"
        lines.append(f"{name:24}{numbers}{times}{f'{operations:,.1f}' if flops else '-':>10}{size:8.2f}")
    return "\n".join(lines)


def table_of_times(nanoseconds: Mapping[str, tuple[int, int]]) -> str:
    """Milliseconds of each part, forward and backward, and its share."""
    whole = [sum(both[way] for both in nanoseconds.values()) for way in (0, 1)]
    lines = [f"{'':24}{'forward':>10}{'backward':>10}{'together':>10}  ms{'share':>8}"]
    for name, (forward, backward) in {**nanoseconds, "all": (whole[0], whole[1])}.items():
        both = forward + backward
        numbers = "".join(f"{spent / 1e6:10.2f}" for spent in (forward, backward, both))
        lines.append(f"{name:24}{numbers}{both / sum(whole):12.1%}")
    return "\n".join(lines)
