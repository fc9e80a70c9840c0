"""Reading the text of a compiled XLA program: scheduled cycles, bytes, collectives and Pallas kernels by scope.

A scope is the `op_name` that JAX gives an operation, such as "jit(step)/jvp(encoder)/stage_1/mlp/mul"; "" if missing.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

_COLLECTIVE_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")

_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_BYTE_WIDTHS = {"pred": 1, "bf16": 2}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Iterations of loops that the data end, by a name in their scope; others of that kind count once. NMS of 256 boxes of
# trained detectors took 3.6 rounds on average, and at most 6. RoIAlign reads 1.6 windows per box on average, if the
# sides of boxes are log-uniform from 16 to 900 pixels.
_TYPICAL_TRIPS = {"nms": 8, "roi_align": 2}
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"')
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVE_KINDS)})(-start)?\(")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP_BOUND = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{([^}]*)\}|true_computation=([^,]*), false_computation=([^,\s]*))"
)
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size in a program.

    Attributes:
        kind: such as "all-reduce".
        group_size: devices that take part in each.
        count: number of them.
        bytes: total size of the whole (gathered or not yet scattered) arrays; for a permutation, the bytes that one
            device sends.
    """

    kind: str
    group_size: int
    count: int
    bytes: int

    def seconds(self, link_bandwidth: float, links: int) -> float:
        """Return a lower bound of the time: the bytes one device must send, at full bandwidth, without latency.

        Args:
            link_bandwidth: of one link, bytes/s.
            links: used at once.
        """
        share = 1.0 if self.kind == "collective-permute" else (self.group_size - 1) / self.group_size
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * share / (link_bandwidth * links)


class Kernel(NamedTuple):
    """A call of a Pallas kernel, with the cost estimate that its author declared; XLA does not look inside.

    Attributes:
        scope: such as "jit(step)/jvp(decoder)/attention/shard_map/forward_kernel/pallas_call".
        flops: of its matrix products.
        transcendentals: exponentials and the like.
        bytes: moved between memory and chip.
    """

    scope: str
    flops: int
    transcendentals: int
    bytes: int


class ProgramStats(NamedTuple):
    """Totals of a compiled program for one device; the body of a loop counts once per iteration.

    A loop that the data end counts a typical number of times: 8 for NMS, 2 for RoIAlign, else 1.

    Attributes:
        cycles: scheduled, by scope; without collectives, Pallas kernels and the branches of `lax.cond`.
        worst_case_cycles: over all scopes, with the longest branch of each `lax.cond`.
        bytes: operands and results of each operation by scope, even where they stay on the chip.
        collectives: sorted by kind and group size.
        kernels: number of calls of each.
    """

    cycles: Counter[str]
    worst_case_cycles: int
    bytes: Counter[str]
    collectives: tuple[Collective, ...]
    kernels: Counter[Kernel]


class _CollectiveCall(NamedTuple):
    """One collective operation; `chain` identifies the pieces into which XLA:TPU splits one, else ""."""

    kind: str
    group_size: int
    bytes: int
    chain: str


class _Loop(NamedTuple):
    condition: str  # computation
    body: str
    trips: int | None  # iterations, if the compiler states them
    typical_trips: int  # if the data end the loop


class _Computation:
    """The operations of one HLO computation, and the computations that it calls."""

    def __init__(self) -> None:
        self.cycles: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.result_sizes: dict[str, int] = {}  # bytes, by name of the operation
        self.collectives: Counter[_CollectiveCall] = Counter()
        self.kernels: Counter[Kernel] = Counter()
        self.called: list[str] = []
        self.fused: list[str] = []
        self.loops: list[_Loop] = []
        self.conditionals: list[list[str]] = []  # branches of each
        self.loop_bound = 1  # the largest integer constant, for a loop's condition


def read_program(text: str, num_devices: int) -> ProgramStats:
    """Read a compiled program.

    Args:
        text: of the program after compilation, from `compiled.as_text()`.
        num_devices: that the program runs on.
    """
    computations, entry = _parse(text, num_devices)
    cycles: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    calls: Counter[_CollectiveCall] = Counter()
    kernels: Counter[Kernel] = Counter()

    def trips(loop: _Loop) -> int:
        stated = loop.trips or computations[loop.condition].loop_bound
        return stated if stated > 1 else loop.typical_trips

    def add(name: str, repeats: int, *, fused: bool = False) -> None:
        computation = computations[name]
        for scope, count in computation.cycles.items():
            cycles[scope] += repeats * count
        if not fused:  # operations inside a fusion do not touch memory
            for scope, size in computation.bytes.items():
                moved[scope] += repeats * size
        for kernel, count in computation.kernels.items():
            kernels[kernel] += repeats * count
        for call, count in computation.collectives.items():
            # XLA:TPU may split a collective into pieces that it overlaps with work; each piece names the whole array.
            calls[call] = max(calls[call], repeats) if call.chain else calls[call] + repeats * count
        for callee in computation.called:
            add(callee, repeats, fused=fused)
        for callee in computation.fused:
            add(callee, repeats, fused=True)
        for loop in computation.loops:
            add(loop.body, repeats * trips(loop))

    def worst_case(name: str) -> int:
        computation = computations[name]
        callees = sum(map(worst_case, computation.called + computation.fused))
        branches = sum(max(map(worst_case, names)) for names in computation.conditionals)
        loops = sum(trips(loop) * worst_case(loop.body) for loop in computation.loops)
        return computation.cycles.total() + callees + branches + loops

    add(entry, 1)
    return ProgramStats(cycles, worst_case(entry), moved, _merge_collectives(calls), kernels)


def scopes_by_operation(text: str) -> dict[str, str]:
    """Map the name of each operation to its scope, control flow excepted.

    Args:
        text: of the program after compilation, from `compiled.as_text()`.
    """
    operations = ((match[1], match[3], line) for line in text.splitlines() if (match := _OPERATION.match(line)))
    return {name: _scope(line) for name, kind, line in operations if kind not in _NO_TRAFFIC}


def _parse(text: str, num_devices: int) -> tuple[dict[str, _Computation], str]:
    """Return the computations by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = defaultdict(_Computation)
    name, entry = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            continue
        computation = computations[name]
        scope = _scope(line)
        computation.bytes[scope] += _bytes_moved(line, computation.result_sizes)
        if cycles := _CYCLES.search(line):
            computation.cycles[scope] += int(cycles[1])
        if kernel := _KERNEL.search(line):
            computation.kernels[Kernel(scope, *map(int, kernel.groups()))] += 1
        if collective := _parse_collective(line, name, num_devices):
            computation.collectives[collective] += 1
        if bound := _LOOP_BOUND.search(line):
            computation.loop_bound = max(computation.loop_bound, int(bound[1]))
        if loop := _LOOP.search(line):
            trips = _TRIP_COUNT.search(line)
            typical = max((_TYPICAL_TRIPS.get(word, 1) for word in re.findall(r"\w+", scope)), default=1)
            computation.loops.append(_Loop(loop[1], loop[2], int(trips[1]) if trips else None, typical))
        elif branches := _BRANCHES.search(line):
            names = branches[1].split(",") if branches[1] else branches.groups()[1:]
            computation.conditionals.append([branch.strip(" %") for branch in names])
        elif " fusion(" in line:
            computation.fused += _CALLED.findall(line)
        elif " call(" in line or "-start(" in line:
            computation.called += _CALLED.findall(line)
    return computations, entry


def _scope(line: str) -> str:
    match = _SCOPE.search(line)
    return match[1] if match else ""


def _array_sizes(shape: str) -> list[int]:
    """Return the bytes of each array in a shape such as "(bf16[8,4]{1,0}, u32[])"."""
    sizes = []
    for dtype, axes in _ARRAY.findall(shape):
        width = _BYTE_WIDTHS.get(dtype) or int(dtype[1:]) // 8
        sizes.append(width * math.prod(int(axis) for axis in axes.split(",") if axis))
    return sizes


def _bytes_moved(line: str, result_sizes: dict[str, int]) -> int:
    """Return the bytes that an operation reads and writes, and record the size of its result in `result_sizes`."""
    match = _OPERATION.match(line)
    if match is None:
        return 0
    name, shape, kind, rest = match.groups()
    result_sizes[name] = sum(_array_sizes(shape))
    if kind in _NO_TRAFFIC or kind.endswith("-start"):
        return 0
    if kind.endswith("-done"):  # of an asynchronous copy or slice
        return 2 * result_sizes[name]
    operands, _, _ = rest.partition(")")
    return result_sizes[name] + sum(result_sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))


def _group_size(line: str, num_devices: int) -> int:
    """Return the devices per group, from any of the three notations of `replica_groups`."""
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return lists[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return num_devices


def _parse_collective(line: str, computation: str, num_devices: int) -> _CollectiveCall | None:
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    shape, kind, start = match.groups()
    sizes = _array_sizes(shape)
    group_size = _group_size(line, num_devices)
    if kind == "collective-permute":
        return _CollectiveCall(kind, group_size, sizes[0], "")
    if start and kind in ("all-gather", "reduce-scatter"):  # the shape lists operands, then results; keep the larger
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[: len(sizes) // 2]
    elif kind == "reduce-scatter":
        sizes = [size * group_size for size in sizes]
    if kind == "all-reduce" and "all-reduce-scatter" in computation:  # XLA:TPU's fused reduce-scatter
        kind = "reduce-scatter"
    chain = re.search(r'(channel_id=\d+).*(chain_id="\d+")', line)
    return _CollectiveCall(kind, group_size, sum(sizes), "".join(chain.groups()) if chain else "")


def _merge_collectives(calls: Counter[_CollectiveCall]) -> tuple[Collective, ...]:
    """Add up calls of the same kind and group size; a group of one device sends nothing."""
    counts: Counter[tuple[str, int]] = Counter()
    sizes: Counter[tuple[str, int]] = Counter()
    for (kind, group_size, size, _), count in calls.items():
        if group_size > 1:
            counts[kind, group_size] += count
            sizes[kind, group_size] += count * size
    return tuple(Collective(*key, counts[key], sizes[key]) for key in sorted(counts))
