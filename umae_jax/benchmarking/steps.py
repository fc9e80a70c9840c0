"""Interleaved timing of training steps: our own configurations, and comparable steps in PyTorch."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from umae_jax.benchmarking.peers import make_peer
from umae_jax.console import GIB
from umae_jax.planning.assembly import Built, build
from umae_jax.planning.compiled import analyze
from umae_jax.planning.flops import count_flops
from umae_jax.planning.hardware import CHIPS
from umae_jax.training.sharding import make_mesh, shardings_of
from umae_jax.training.state import TrainState

MIN_SECONDS = 1.0  # per turn, rounded up to whole steps


@dataclass
class Contender:
    """A training step to time.

    Attributes:
        name: name of the configuration file or of the peer.
        run_steps: function that runs the given number of steps and blocks until they are done.
        parameters: number of trained parameters.
        compile_seconds: time to compile the step or to read it from the compilation cache; None for a peer.
        flops: FLOPs per step, on all devices together; None if unknown.
        temp_bytes, peak_bytes: temporary and peak memory per device, from the compiler; None if unknown.
        program: text of the compiled step; None for a peer.
        seconds: measured seconds per step, one value per turn.
    """

    name: str
    run_steps: Callable[[int], None]
    parameters: int
    compile_seconds: float | None = None
    flops: float | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    program: str | None = None
    seconds: list[float] = field(default_factory=list)


class CompiledStep(NamedTuple):
    """A configuration's step, compiled for all devices, and its initial state."""

    built: Built
    compiled: jax.stages.Compiled
    compile_seconds: float
    state: TrainState


def compile_step(config: ConfigDict) -> CompiledStep:
    """Compile the step of a configuration and initialize its state.

    Raises:
        UserError: if the model's sizes are inconsistent.
    """
    built = build(config, make_mesh(config.mesh.fsdp))
    start = time.perf_counter()
    compiled = built.lower().compile()
    return CompiledStep(built, compiled, time.perf_counter() - start, built.initialize())


def jax_step(name: str, config: ConfigDict) -> Contender:
    """Return the step of a configuration; every step reuses one batch of random pixels on the devices.

    Raises:
        UserError: if the model's sizes are inconsistent.
    """
    built, compiled, compile_seconds, state = compile_step(config)
    rng = np.random.default_rng(0)

    def fill(array: jax.ShapeDtypeStruct) -> np.ndarray:
        if array.dtype == np.uint8:  # images
            return rng.integers(0, 256, array.shape, np.uint8)
        if array.dtype == np.uint32:  # sample indices
            return np.arange(math.prod(array.shape), dtype=np.uint32).reshape(array.shape)
        return np.zeros(array.shape, array.dtype)

    batch = jax.device_put(jax.tree.map(fill, built.batch), shardings_of(built.batch))

    def run_steps(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)

    stats = analyze(compiled, built.mesh.size)
    return Contender(
        name,
        run_steps,
        parameters=sum(math.prod(array.shape) for array in jax.tree.leaves(built.run.state.params)),
        compile_seconds=compile_seconds,
        flops=count_flops(config),
        temp_bytes=stats.temp_bytes,
        peak_bytes=stats.peak_bytes,
        program=compiled.as_text(),
    )


def peer_step(name: str, config: ConfigDict) -> Contender:
    """Return the step of a PyTorch peer with the sizes, precision and batch of a configuration; see `peers.py`.

    Raises:
        UserError: if the configuration has no such peer, or PyTorch is not installed.
    """
    peer = make_peer(name, config, config.batch_size)

    def run_steps(steps: int) -> None:
        for _ in range(steps):
            peer.step()

    return Contender(name, run_steps, peer.parameters)


def time_interleaved(contenders: Sequence[Contender], rounds: int, report: Callable[[str], None]) -> None:
    """Time each contender once per round, in an order that is reversed every other round.

    Each warms up with two steps; the second determines how many steps make a turn of MIN_SECONDS.
    """
    steps_per_turn = []
    for contender in contenders:
        contender.run_steps(1)
        start = time.perf_counter()
        contender.run_steps(1)
        steps_per_turn.append(max(1, math.ceil(MIN_SECONDS / (time.perf_counter() - start))))
    turns = list(zip(contenders, steps_per_turn, strict=True))
    for number in range(rounds):
        for contender, steps in turns if number % 2 == 0 else reversed(turns):
            start = time.perf_counter()
            contender.run_steps(steps)
            contender.seconds.append((time.perf_counter() - start) / steps)
        report(f"round {number + 1} of {rounds}")


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Return the min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def results(contenders: Sequence[Contender], batch_size: int) -> list[dict[str, Any]]:
    """Return the measurements of each contender; speed-ups are relative to the first, turn by turn."""
    chip = CHIPS.get(jax.devices()[0].device_kind)
    peak_flops = None if chip is None else chip.peak_flops * jax.device_count()
    measured = []
    for contender in contenders:
        seconds = summarize(contender.seconds)
        flops_per_second = contender.flops / seconds["median"] if contender.flops else None
        ratios = [first / own for first, own in zip(contenders[0].seconds, contender.seconds, strict=True)]
        measured.append(
            {
                "name": contender.name,
                "parameters": contender.parameters,
                "batch_size": batch_size,
                "compile_seconds": contender.compile_seconds,
                "seconds": seconds,
                "images_per_second": batch_size / seconds["median"],
                "flops": contender.flops,
                "flops_per_second": flops_per_second,
                "mfu": flops_per_second / peak_flops if flops_per_second and peak_flops else None,
                "temp_bytes": contender.temp_bytes,
                "peak_bytes": contender.peak_bytes,
                "speedup": summarize(ratios),
            }
        )
    return measured


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Format results as a table with one line per contender."""

    def number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
        return "-" if value is None else f"{value / scale:,.{digits}f}"

    rows = [
        [
            *("", "step, ms", "min to max", "images/s", "TFLOP/s", "MFU", "compile, s"),
            *("temporary, GiB", "peak, GiB", "speed relative to the first"),
        ]
    ]
    for one in measured:
        seconds, speedup = one["seconds"], one["speedup"]
        rows.append(
            [
                one["name"],
                number(seconds["median"], 1e-3, 1),
                f"{number(seconds['min'], 1e-3, 1)} to {number(seconds['max'], 1e-3, 1)}",
                number(one["images_per_second"], digits=1),
                number(one["flops_per_second"], 1e12),
                "-" if one["mfu"] is None else f"{one['mfu']:.1%}",
                number(one["compile_seconds"], digits=1),
                number(one["temp_bytes"], GIB),
                number(one["peak_bytes"], GIB),
                f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
