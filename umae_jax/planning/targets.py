"""Devices to compile for: TPU slices, which this machine need not have, and local devices."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from umae_jax.console import GIB
from umae_jax.errors import require
from umae_jax.planning.assembly import build
from umae_jax.planning.compiled import CompiledStats, analyze
from umae_jax.planning.hardware import CHIPS, GPUS, Chip, Topology, parse_topology
from umae_jax.training.memory import is_exhausted
from umae_jax.training.sharding import make_mesh

# Gathers and scatters on a SparseCore make programs whose text JAX's own XLA cannot read.
_READABLE: dict[str, str | bool] = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: of the topology, or of the local devices.
        devices: JAX devices, or descriptions of absent ones.
        chip: specification of each device; None if unknown.
        memory: bytes that a program may use on each device; None if unknown.
        topology: of a TPU slice; None for local devices.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None
    memory: float | None
    topology: Topology | None = None


class OutOfMemory(Exception):  # noqa: N818 - an expected result
    """A step needs more memory than a chip has.

    Attributes:
        required: bytes; infinite if the compiler does not report them.
    """

    def __init__(self, required: float) -> None:
        super().__init__("does not fit" if math.isinf(required) else f"needs {required / GIB:.2f} GiB")
        self.required = required


def find_target(name: str) -> Target:
    """Return the target for a TPU slice such as "v5e:2x4", or for the local GPUs such as "h100".

    Raises:
        UserError: if there is no such target, or its compiler is not installed.
    """
    if name.lower() in GPUS:
        local = local_target()
        require(
            name.lower() in local.name.lower(),
            f"--topology: {name} needs a machine with this GPU, and this one has {local.name}; name a TPU slice, or "
            "run the command on that machine",
        )
        return local
    topology = parse_topology(name)
    require(
        importlib.util.find_spec("libtpu") is not None,
        '--topology: the TPU compiler is missing; install it with pip install "umae_jax[plan]"',
    )
    # Without these libtpu looks for TPUs on this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling does not need exclusive access
    jax.local_devices()  # reads XLA_FLAGS for the local devices
    os.environ.pop("XLA_FLAGS", None)  # libtpu ends the process if it does not know a flag, such as those of XLA:CPU
    # Programs for absent devices cannot be loaded from the cache. JAX reads the setting only once, hence the reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Target(name, devices, topology.chip, topology.chip.memory, topology)


def local_target() -> Target:
    """Return the devices of this machine."""
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind)
    memory = (device.memory_stats() or {}).get("bytes_limit", chip.memory if chip else None)
    return Target(f"{jax.device_count()} x {device.device_kind}", jax.devices(), chip, memory)


def lower_for(config: ConfigDict, target: Target) -> jax.stages.Lowered:
    """Lower the training step of a configuration for a target.

    Raises:
        UserError: if the model's sizes are inconsistent.
    """
    return build(config, make_mesh(config.mesh.fsdp, target.devices)).lower()


def compile_for(lowered: jax.stages.Lowered, target: Target) -> CompiledStats:
    """Compile a lowered step for its target and return its statistics.

    Raises:
        OutOfMemory: if a chip does not have enough memory.
    """
    try:
        compiled = lowered.compile(_READABLE if target.topology else None)
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        message = str(error)
        gib = re.search(r"\(([\d.]+)G\) exceeds available", message) or re.search(r"Used ([\d.]+)G", message)
        raise OutOfMemory(float(gib[1]) * GIB if gib else math.inf) from None
    stats = analyze(compiled, len(target.devices))
    if target.memory and stats.peak_bytes > target.memory:  # XLA:GPU compiles programs that do not fit
        raise OutOfMemory(stats.peak_bytes)
    return stats
