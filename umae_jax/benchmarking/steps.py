"""Training steps timed in turn: those of several configurations, and of peers in PyTorch."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from umae_jax.benchmarking.peers import make_peer
from umae_jax.data.pipeline import Batch
from umae_jax.planning.assembly import Assembly, assemble, count_flops
from umae_jax.planning.compiled import analyze
from umae_jax.planning.hardware import GIB, KINDS
from umae_jax.training.runs import initialize
from umae_jax.training.sharding import make_mesh, shardings_of
from umae_jax.training.step import TrainState

MIN_SECONDS = 1.0  # that a turn takes, in whole steps


@dataclasses.dataclass
class Contender:
    """A training step ready to be timed.

    Attributes:
        name: of a configuration's file, or of a peer.
        take: so many steps; returns when they are done.
        parameters: how many are trained.
        compile_seconds: that the step took to compile, or to be read from where it was kept; None where nothing is.
        flops: operations of a step, on all devices together, if they are known.
        temp_bytes, peak: bytes of memory a device, by the compiler, if they are known.
        program: the text of the compiled step; None of a peer's.
        seconds: of a step, one number a turn.
    """

    name: str
    take: Callable[[int], None]
    parameters: int
    compile_seconds: float | None
    flops: float | None
    temp_bytes: int | None
    peak: int | None
    program: str | None
    seconds: list[float] = dataclasses.field(default_factory=list)


class Ready(NamedTuple):
    """A configuration's step, compiled for all devices.

    Attributes:
        assembly: what it is made of.
        compiled: the step.
        compile_seconds: that this took.
        state: the first one.
    """

    assembly: Assembly
    compiled: jax.stages.Compiled
    compile_seconds: float
    state: TrainState


def prepare(config: ConfigDict) -> Ready:
    """Compile the step of a configuration and make its first state.

    Raises:
        UserError: if the configuration's numbers do not fit together.
    """
    assembly = assemble(config, make_mesh(config.mesh.fsdp))
    start = time.perf_counter()
    compiled = assembly.lower().compile()
    return Ready(assembly, compiled, time.perf_counter() - start, initialize(config, assembly.run))


def our_step(name: str, config: ConfigDict) -> Contender:
    """The compiled step of a configuration with its first state and one batch of noise, on all devices.

    Raises:
        UserError: if the configuration's numbers do not fit together.
    """
    assembly, compiled, seconds, state = prepare(config)
    noise = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return noise.integers(0, 256, shape.shape).astype(shape.dtype)

    size = config.batch_size
    host = Batch(fill(assembly.batch.image), np.arange(size, dtype=np.uint32), *np.zeros((2, size), np.int32))
    batch = jax.device_put(host, shardings_of(assembly.batch))

    def take(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)

    told = analyze(compiled, assembly.mesh.size)
    parameters = sum(math.prod(array.shape) for array in jax.tree.leaves(assembly.run.state.params))
    flops, program = count_flops(config), compiled.as_text()
    return Contender(name, take, parameters, seconds, flops, told.temp_bytes, told.peak, program)


def peer_step(name: str, config: ConfigDict) -> Contender:
    """The step of a peer, of the sizes, precision and batch of a configuration; see `peers.py`.

    Raises:
        UserError: if there is no such peer for it, or PyTorch is missing.
    """
    peer = make_peer(name, config, config.batch_size)

    def take(steps: int) -> None:
        for _ in range(steps):
            peer.step()

    return Contender(name, take, peer.parameters, None, None, None, None, None)


def time_in_turn(contenders: Sequence[Contender], rounds: int, say: Callable[[str], None]) -> None:
    """Have each take its turn, round after round, in an order that turns round as well.

    Each warms up with two steps, the second of which tells how many make a turn of MIN_SECONDS.
    """
    turns = []
    for contender in contenders:
        contender.take(1)
        start = time.perf_counter()
        contender.take(1)
        turns.append(max(1, math.ceil(MIN_SECONDS / (time.perf_counter() - start))))
    pairs = list(zip(contenders, turns, strict=True))
    for number in range(rounds):
        for contender, steps in pairs if number % 2 == 0 else reversed(pairs):
            start = time.perf_counter()
            contender.take(steps)
            contender.seconds.append((time.perf_counter() - start) / steps)
        say(f"round {number + 1} of {rounds}")


def results(contenders: Sequence[Contender], images: int) -> list[dict[str, Any]]:
    """What was measured of each; speed-ups are over the first, turn by turn."""
    chip = KINDS.get(jax.devices()[0].device_kind)
    told = []
    for contender in contenders:
        seconds = statistics.median(contender.seconds)
        achieved = None if contender.flops is None else contender.flops / seconds
        best = None if chip is None else chip.flops * jax.device_count()
        ratios = [one / other for one, other in zip(contenders[0].seconds, contender.seconds, strict=True)]
        told.append(
            {
                "name": contender.name,
                "parameters": contender.parameters,
                "images": images,
                "compile_seconds": contender.compile_seconds,
                "seconds": {"least": min(contender.seconds), "median": seconds, "most": max(contender.seconds)},
                "images_per_second": images / seconds,
                "flops": contender.flops,
                "flops_per_second": achieved,
                "utilization": None if achieved is None or best is None else achieved / best,
                "temp_bytes": contender.temp_bytes,
                "peak": contender.peak,
                "speed": {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)},
            }
        )
    return told


def table(told: Sequence[dict[str, Any]]) -> str:
    """The results side by side, one line each."""

    def number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
        return "-" if value is None else f"{value / scale:,.{digits}f}"

    rows = [
        [
            *("", "step, ms", "least to most", "images/s", "TFLOP/s", "of the best", "compile, s"),
            *("temp_bytes, GiB", "peak, GiB", "speed over the first"),
        ]
    ]
    for one in told:
        seconds, speed = one["seconds"], one["speed"]
        rows.append(
            [
                one["name"],
                number(seconds["median"], 1e-3, 1),
                f"{number(seconds['least'], 1e-3, 1)} to {number(seconds['most'], 1e-3, 1)}",
                number(one["images_per_second"], digits=1),
                number(one["flops_per_second"], 1e12),
                "-" if one["utilization"] is None else f"{one['utilization']:.1%}",
                number(one["compile_seconds"], digits=1),
                number(one["temp_bytes"], GIB),
                number(one["peak"], GIB),
                f"{speed['median']:.2f} ({speed['least']:.2f} to {speed['most']:.2f})",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
