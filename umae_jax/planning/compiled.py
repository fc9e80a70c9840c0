"""What the compiler tells of a compiled step: memory, work, collectives and, for TPUs, the time it is scheduled for."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

_WIDTHS = {"pred": 1, "bf16": 2}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{([^}]*)\}|true_computation=([^,]*), false_computation=([^,\s]*))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"(\d+)","bytes_accessed":"(\d+)"')
_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_MOVES_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
_LIMIT = re.compile(r"[su]32\[\][^ ]* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one size, in a step.

    Attributes:
        kind: such as "all-reduce".
        devices: in a group.
        count: how often.
        bytes: together, of the whole arrays on which a group works; of a permutation, what a device sends.
    """

    kind: str
    devices: int
    count: int
    bytes: int

    def seconds(self, link: float, links: int) -> float:
        """The least time over so many links of so many bytes a second: what a device must send, and no latency."""
        share = 1.0 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * share / (link * links)


class Kernel(NamedTuple):
    """A call of a kernel, of whose inside the compiler tells nothing; what it must do at least, as it says itself.

    Attributes:
        scope: such as "jit(step)/jvp(decoder)/attention/shard_map/forward_kernel/pallas_call".
        flops, transcendentals: operations of its matrix products, and exponentials and the like.
        bytes: moved between memory and chip.
    """

    scope: str
    flops: int
    transcendentals: int
    bytes: int


class CompiledStats(NamedTuple):
    """A compiled program, a device.

    Attributes:
        arguments, temp_bytes, peak: bytes of memory; the peak counts donated arguments once.
        bytes: moved between memory and chip.
        cycles: that XLA:TPU schedules, without collectives and without what is inside a kernel or the branches of a
            choice; None elsewhere.
        worst_case_cycles: the same where each choice takes its longest branch. See `_shift` in models/attention.py, whose
            shorter branch does nothing.
        cycles_by_scope: the same by the scope of an operation, such as "jit(step)/jvp(encoder)/stage_1/mlp/mul".
        bytes_by_scope: operands and results of each operation, on the chip or not: near `bytes`, not the same.
        collectives: between devices.
        kernels: how often each is called.
    """

    arguments: int
    temp_bytes: int
    peak: int
    bytes: float
    cycles: int | None
    worst_case_cycles: int | None
    cycles_by_scope: dict[str, int]
    bytes_by_scope: dict[str, int]
    collectives: tuple[Collective, ...]
    kernels: dict[Kernel, int]


class _Occurrence(NamedTuple):
    """A collective: kind, devices of a group, bytes, and what its pieces have in common where it was cut into such."""

    kind: str
    devices: int
    bytes: int
    chain: str


class _Computation:
    def __init__(self) -> None:
        self.cycles: Counter[str] = Counter()  # by the scope of the operation
        self.bytes: Counter[str] = Counter()  # likewise
        self.sizes: dict[str, int] = {}  # bytes of the results of each operation
        self.collectives: Counter[_Occurrence] = Counter()
        self.kernels: Counter[Kernel] = Counter()
        self.called: list[str] = []
        self.fused: list[str] = []
        self.loops: list[tuple[str, str, int | None]] = []  # condition, body, how often if the program says it
        self.choices: list[list[str]] = []  # branches
        self.limit = 1


def _size(shape: str) -> list[int]:
    """Bytes of each array that a shape names."""
    sizes = []
    for kind, sides in _ARRAY.findall(shape):
        width = _WIDTHS.get(kind) or int(kind[1:]) // 8
        sizes.append(width * math.prod(int(side) for side in sides.split(",") if side))
    return sizes


def _group(line: str, devices: int) -> int:
    """Devices of a group, as `replica_groups` tells in one of its notations."""
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return lists[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return devices


def _collective(line: str, name: str, devices: int) -> _Occurrence | None:
    found = _COLLECTIVE.search(line)
    if found is None:
        return None
    shape, kind, start = found.groups()
    sizes = _size(shape)
    group = _group(line, devices)
    if kind == "collective-permute":
        return _Occurrence(kind, group, sizes[0], "")
    if start and kind in ("all-gather", "reduce-scatter"):
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[: len(sizes) // 2]  # operands, results
    elif kind == "reduce-scatter":
        sizes = [size * group for size in sizes]
    if kind == "all-reduce" and "all-reduce-scatter" in name:  # XLA:TPU's fused form
        kind = "reduce-scatter"
    chain = re.search(r'(channel_id=\d+).*(chain_id="\d+")', line)
    return _Occurrence(kind, group, sum(sizes), "".join(chain.groups()) if chain else "")


def _moved(line: str, sizes: dict[str, int]) -> int:
    """Bytes that an operation reads and writes; its result is added to the sizes, of its computation's results."""
    found = _OPERATION.match(line)
    if found is None:
        return 0
    name, shape, kind, rest = found.groups()
    sizes[name] = sum(_size(shape))
    if kind in _MOVES_NOTHING or kind.endswith("-start"):
        return 0
    if kind.endswith("-done"):  # of a copy or slice that goes on beside other work
        return 2 * sizes[name]
    operands, _, _ = rest.partition(")")
    return sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))


class Program(NamedTuple):
    """What the text of a compiled program says, each as often as loops repeat it.

    Attributes:
        cycles, bytes: by scope; see `CompiledStats`.
        worst_case_cycles: of all scopes together, with the longest branch of each choice.
        collectives, kernels: as there.
    """

    cycles: Counter[str]
    bytes: Counter[str]
    worst_case_cycles: int
    collectives: tuple[Collective, ...]
    kernels: Counter[Kernel]


def read_program(text: str, devices: int) -> Program:
    """Read a compiled program.

    Args:
        text: XLA's own, after compilation.
        devices: that the program runs on.
    """
    computations: dict[str, _Computation] = defaultdict(_Computation)
    name, entry = "", ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins[2]
            entry = name if begins[1] else entry
            continue
        here = computations[name]
        named = _SCOPE.search(line)
        scope = named[1] if named else ""
        here.bytes[scope] += _moved(line, here.sizes)
        if cycles := _CYCLES.search(line):
            here.cycles[scope] += int(cycles[1])
        if kernel := _KERNEL.search(line):
            here.kernels[Kernel(scope, *map(int, kernel.groups()))] += 1
        if collective := _collective(line, name, devices):
            here.collectives[collective] += 1
        if limit := _LIMIT.search(line):
            here.limit = max(here.limit, int(limit[1]))
        if loop := _LOOP.search(line):
            told = _TRIPS.search(line)
            here.loops.append((loop[1], loop[2], int(told[1]) if told else None))
        elif choice := _BRANCHES.search(line):
            names = choice[1].split(",") if choice[1] else choice.groups()[1:]
            here.choices.append([name.strip(" %") for name in names])
        elif " fusion(" in line:
            here.fused += _CALLED.findall(line)
        elif " call(" in line or "-start(" in line:
            here.called += _CALLED.findall(line)

    cycles_of: Counter[str] = Counter()
    bytes_of: Counter[str] = Counter()
    collectives: Counter[_Occurrence] = Counter()
    kernels: Counter[Kernel] = Counter()

    def longest(name: str) -> int:
        """Cycles of a computation, with the longest branches of its choices."""
        here = computations[name]
        called = sum(map(longest, here.called + here.fused)) + sum(max(map(longest, one)) for one in here.choices)
        looped = sum((trips or computations[condition].limit) * longest(body) for condition, body, trips in here.loops)
        return here.cycles.total() + called + looped

    def add(name: str, times: int, *, fused: bool = False) -> None:
        here = computations[name]
        for scope, size in here.bytes.items() if not fused else ():  # what is fused moves nothing by itself
            bytes_of[scope] += times * size
        for scope, cycles in here.cycles.items():
            cycles_of[scope] += times * cycles
        for kernel, count in here.kernels.items():
            kernels[kernel] += times * count
        for collective, count in here.collectives.items():
            # XLA:TPU cuts one that it overlaps with work into pieces, and each names all of it.
            before = collectives[collective]
            collectives[collective] = max(before, times) if collective.chain else before + times * count
        for called in here.called:
            add(called, times, fused=fused)
        for called in here.fused:
            add(called, times, fused=True)
        for condition, body, trips in here.loops:
            add(body, times * (trips or computations[condition].limit))

    add(entry, 1)
    together: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for (kind, group, size, _), count in collectives.items():
        if group > 1:
            together[kind, group][0] += count
            together[kind, group][1] += count * size
    found = tuple(Collective(kind, group, *numbers) for (kind, group), numbers in sorted(together.items()))
    return Program(cycles_of, bytes_of, longest(entry), found, kernels)


def scopes_of_operations(text: str) -> dict[str, str]:
    """The scope of each operation of a compiled program by its name; "" where it has none. Without control flow.

    Args:
        text: XLA's own, after compilation.
    """
    scopes = {}
    for line in text.splitlines():
        found = _OPERATION.match(line)
        if found and found[3] not in _MOVES_NOTHING:
            scope = _SCOPE.search(line)
            scopes[found[1]] = scope[1] if scope else ""
    return scopes


def analyze(compiled: Any, devices: int) -> CompiledStats:  # noqa: ANN401 - JAX's Compiled
    """What the compiler tells of a compiled program.

    Args:
        compiled: what `jax.jit(...).lower(...).compile()` gives.
        devices: that it runs on.
    """
    memory = compiled.memory_analysis()
    costs = compiled.cost_analysis()
    program = read_program(compiled.as_text(), devices)
    arguments, temp_bytes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + temp_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = costs.get("bytes accessed", 0.0)
    return CompiledStats(
        arguments=arguments,
        temp_bytes=temp_bytes,
        peak=peak,
        bytes=moved,
        cycles=program.cycles.total() or None,
        worst_case_cycles=program.worst_case_cycles or None,
        cycles_by_scope=dict(program.cycles),
        bytes_by_scope=dict(program.bytes),
        collectives=program.collectives,
        kernels=dict(program.kernels),
    )
