"""What a step can be compiled for without a run: TPU slices, which need not be there, and the devices that are."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from umae_jax.errors import require
from umae_jax.planning.assembly import assemble
from umae_jax.planning.compiled import CompiledStats, analyze
from umae_jax.planning.hardware import GIB, GPUS, KINDS, Chip, Topology, topology
from umae_jax.training.sharding import make_mesh

MAX = 1 << 15  # images a chip; more is not looked for
STEP = 8  # images a chip; the largest batch is searched for among multiples of this


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        name: of the topology, or of the devices that are there.
        devices: as JAX knows them.
        chip: what each can do, if it is known.
        memory: bytes that a program may have on each, if that is known.
        slice: the topology, if it is one.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    memory: float | None
    slice: Topology | None = None


def find_target(name: str) -> Target:
    """The target of a topology's name, or of that of a GPU that is there.

    Raises:
        UserError: if there is none, or its compiler is missing.
    """
    if name.lower() in GPUS:
        there = local_target()
        require(
            name.lower() in there.name.lower(),
            f"--topology: {name} can be planned for only where it is, and here is {there.name}; name a TPU slice, or "
            "run this on that machine",
        )
        return there
    known = topology(name)
    require(
        importlib.util.find_spec("libtpu") is not None,
        '--topology: the compiler for TPUs is missing; install it with pip install "umae_jax[plan]"',
    )
    # Without these it looks for the TPU of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # only who uses a TPU must be alone
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for others cannot be read back here
    described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return Target(name, described.devices, known.chip, known.chip.memory, known)


def local_target() -> Target:
    """The devices that are there."""
    device = jax.devices()[0]
    chip = KINDS.get(device.device_kind)
    memory = (device.memory_stats() or {}).get("bytes_limit", chip.memory if chip else None)
    return Target(f"{jax.device_count()} x {device.device_kind}", jax.devices(), chip, memory)


class DoesNotFit(Exception):  # noqa: N818 - an answer
    """That a step needs more memory than a chip has, in words.

    Attributes:
        needed: bytes; infinite where the compiler does not tell.
    """

    def __init__(self, needed: float) -> None:
        super().__init__("does not fit" if math.isinf(needed) else f"needs {needed / GIB:.2f} GiB")
        self.needed = needed


def lower_for(config: ConfigDict, target: Target) -> jax.stages.Lowered:
    """The step of a configuration ready to be compiled for a target.

    Raises:
        UserError: if the model's numbers do not fit together.
    """
    return assemble(config, make_mesh(config.mesh.fsdp, target.devices)).lower()


def compile_for(lowered: jax.stages.Lowered, target: Target) -> CompiledStats:
    """Compile for a target what `lower_for` gave.

    Raises:
        DoesNotFit: if the memory of a chip does not suffice.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"\(([\d.]+)G\) exceeds available", str(error)) or re.search(r"Used ([\d.]+)G", str(error))
        raise DoesNotFit(float(needed[1]) * GIB if needed else math.inf) from None
    told = analyze(compiled, len(target.devices))
    if target.memory and told.peak > target.memory:  # XLA:GPU compiles what will not fit
        raise DoesNotFit(told.peak)
    return told


def largest_batch(
    config: ConfigDict, target: Target, own: CompiledStats | DoesNotFit, say: Callable[[str], None]
) -> int:
    """The largest batch a chip whose step fits, found by compiling, to an eighth; 0 if not even STEP fits.

    Memory grows about in proportion to the batch, so that few are tried: one where the last two say that memory ends,
    and one an eighth above to see that it does.

    Args:
        config: of the run.
        target: what it is for; its memory must be known.
        own: what compiling the configuration itself gave.
        say: takes a line to the user on each batch that is tried.
    """
    assert target.memory is not None
    memory, chips = target.memory, len(target.devices)
    trial = config.copy_and_resolve_references().unlock()
    trial.grad_accum_steps = 1
    # By images a chip. Near the limit the compiler saves, and needs less than it says of what does not fit.
    needs: dict[int, float] = {0: own.arguments if isinstance(own, CompiledStats) else 0}
    images = config.batch_size // chips // config.grad_accum_steps
    if config.grad_accum_steps == 1 and images % STEP == 0:
        needs[images] = own.peak if isinstance(own, CompiledStats) else own.needed

    def fits(batch: int) -> bool:
        if batch not in needs:
            trial.batch_size = batch * chips
            try:
                needs[batch] = compile_for(lower_for(trial, target), target).peak
            except DoesNotFit as answer:
                needs[batch] = answer.needed
            say(f"{target.name}: {batch} images a chip {'fit' if needs[batch] <= memory else 'do not fit'}")
        return needs[batch] <= memory

    def end(first: int, second: int) -> float:
        """Where memory ends by a straight line through two batches; halfway where that says nothing."""
        slope = (needs[second] - needs[first]) / (second - first)
        return first + (memory - needs[first]) / slope if 0 < slope < math.inf else (first + second) / 2

    low, high = 0, MAX + STEP
    batch = max(STEP, min(images, MAX) // STEP * STEP)
    while True:
        if fits(batch):
            low = batch
        else:
            high = batch
        least = low + max(STEP, low // 8 // STEP * STEP)
        if high <= least:
            return low
        if high > MAX:
            batch = max(least, int(end(max(one for one in needs if one < low), low)))
        else:
            quarter = (high - low) // 4
            batch = min(max(int(end(low, high)), low + quarter), high - quarter)
        batch = min(max(batch // STEP * STEP, low + STEP), high - STEP)
