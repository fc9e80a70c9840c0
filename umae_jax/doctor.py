"""Check processes, devices, data and directory before a run is started on them.

    python -m umae_jax.doctor [--config FILE] [--workdir DIR] [--coordinator HOST:PORT --processes N --process I]

Start it as the run would be started, in every process. Process 0 prints one page of findings; the status is not 0
where something is wrong.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from umae_jax import cli
from umae_jax.config import check
from umae_jax.data.pipeline import host_cores
from umae_jax.data.sources import open_source
from umae_jax.errors import require
from umae_jax.files import AnyPath, locate, reason, write_whole
from umae_jax.planning.hardware import GIB
from umae_jax.processes import versions
from umae_jax.training.agreement import all_gather_json
from umae_jax.training.sharding import batch_sharding, make_mesh, replicated

FLOATS = 1 << 22  # that each device brings to the collective: 16 MiB
ROUNDS = 5
MAX_APART = 2.0  # seconds between the clocks of two hosts

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory that the run would write to.")
_PROCESSES = cli.define_processes()


def fault_of(work: Callable[[], object]) -> str:
    """Why something cannot be done; "" if it can."""
    try:
        work()
    except Exception as error:
        return reason(error)
    return ""


def write_and_remove(workdir: AnyPath) -> None:
    """Check that a directory can be written to, by this process."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f".doctor-{jax.process_index()}"
    write_whole(path, b"written by umae_jax.doctor")
    path.unlink()


def examine(config: Any, workdir: AnyPath | None) -> dict[str, Any]:  # noqa: ANN401 - a ConfigDict or None
    """What this process finds where it runs."""
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.local_device_count(),
        "device_memory": memory,
        "processors": host_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "faults": [],
    }
    if device.platform == "cpu" and Path("/dev/nvidia0").exists():
        found["faults"].append('this host has a GPU that JAX does not find; install with pip install -e ".[cuda]"')
    if config is not None:

        def read() -> None:
            source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
            found["images"] = len(source)
            found["first"] = source[0].name

        found["faults"] += (
            [fault if fault.startswith("data.") else f"data.source: {fault}"] if (fault := fault_of(read)) else []
        )
        found["faults"] += [fault] if (fault := fault_of(lambda: check(config))) else []
    if workdir is not None:
        fault = fault_of(lambda: write_and_remove(workdir))
        found["faults"] += [f"--workdir: {fault}"] if fault else []
    return found


def time_collective() -> tuple[bool, float]:
    """Sum an array over all devices: whether the sum is right, and the seconds it takes."""
    mesh = make_mesh()
    devices = jax.device_count()
    numbers = np.arange(devices, dtype=np.float32)  # device i brings i

    def rows(index: tuple[slice, ...] | None) -> np.ndarray:  # of one device: no host holds all of them
        return np.repeat(numbers[index[0] if index else slice(None)][:, None], FLOATS, axis=1)

    array = jax.make_array_from_callback((devices, FLOATS), batch_sharding(mesh), rows)
    add = jax.jit(lambda array: array.sum(0), out_shardings=replicated(mesh))
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        total = jax.block_until_ready(add(array))
        seconds.append(time.perf_counter() - start)
    right = bool(jnp.all(total.addressable_data(0) == numbers.sum()))
    return right, statistics.median(seconds[1:])  # the first compiles


def page(found: list[dict[str, Any]], clocks: list[float], collective: tuple[bool, float]) -> tuple[list[str], bool]:
    """The findings of all processes as lines, and whether all is well."""
    well = True
    lines = []

    def tell(good: bool, line: str) -> None:
        nonlocal well
        well &= good
        lines.append(f"{'ok   ' if good else 'WRONG'}  {line}")

    tell(True, "software: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    for index, here in enumerate(found):
        device = f"{here['devices']} x {here['kind']}"
        device += f" of {here['device_memory'] / GIB:.1f} GiB" if here["device_memory"] else ""
        images = f", {here['images']:,} images, the first {here['first']}" if "images" in here else ""
        host = f"{here['processors']} processors, {here['memory'] / GIB:.0f} GiB{images}"
        tell(True, f"process {index} on {here['host']}: {device}; {host}")
        for fault in here["faults"]:
            tell(False, f"process {index} on {here['host']}: {fault}")
    for name, what in (("kind", "devices"), ("devices", "numbers of devices"), ("images", "data")):
        seen = sorted({str(here.get(name)) for here in found})
        if len(seen) > 1:
            tell(False, f"the processes see different {what}: {', '.join(seen)}")
    apart = max(clocks) - min(clocks)
    if len(found) > 1:
        tell(apart < MAX_APART, f"clocks are {apart:.2f} s apart")
        tell(True, f"{len(found)} processes met, with the same software, configuration and directory")
    right, seconds = collective
    speed = FLOATS * 4 / seconds / 1e9
    devices = sum(here["devices"] for here in found)
    tell(right, f"a sum over {devices} devices, {FLOATS * 4 >> 20} MiB each: {seconds * 1e3:.1f} ms, {speed:.2f} GB/s")
    return lines, well


def main() -> None:
    """Examine, and print the page."""
    config = cli.read_config(_CONFIG) if flags.FLAGS["config"].present else None
    workdir = locate(_WORKDIR.value, "--workdir") if _WORKDIR.value else None
    cli.join(_PROCESSES, config, workdir)
    found = all_gather_json(examine(config, workdir))
    clocks = all_gather_json(time.time())
    lines, well = page(found, clocks, time_collective())
    cli.result("\n".join(lines))
    require(well, "not all is well; mend what the lines above call wrong")


if __name__ == "__main__":
    cli.run(main)
