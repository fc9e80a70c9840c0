"""The findings of the command `doctor` about processes, devices, data and directory."""

import contextlib
import functools
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from umae_jax import multihost
from umae_jax.config import check
from umae_jax.console import GIB
from umae_jax.data.pipeline import host_cores
from umae_jax.data.sources import open_source
from umae_jax.files import AnyPath, explain, write_atomic

FLOATS = 1 << 22  # summed per device: 16 MiB
ROUNDS = 5
MAX_CLOCK_DIFFERENCE = 2.0  # seconds


def _inspect_process(config: ConfigDict | None, workdir: AnyPath | None) -> dict[str, Any]:
    """Return JSON about this process: its host, a description, values that must be equal in all, and faults."""
    device = jax.local_devices()[0]
    devices = f"{jax.local_device_count()} x {device.device_kind}"
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    description = devices + (f" of {limit / GIB:.1f} GiB" if limit else "")
    description += f"; {host_cores()} cores, {memory / GIB:.0f} GiB"
    equal: dict[str, Any] = {"devices": devices}
    faults: list[str] = []

    @contextlib.contextmanager
    def collect_fault(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            fault = explain(error) or (str(error) if isinstance(error, OSError) else "")
            if not fault:
                raise
            faults.append(fault if fault.startswith(("data.", name)) else f"{name}: {fault}")

    if device.platform == "cpu" and Path("/dev/nvidia0").exists():
        faults.append('JAX does not find the GPU of this host; install with pip install -e ".[cuda]"')
    if config is not None:
        with collect_fault("data.source"):
            source = open_source(config.data.source, split=config.data.split, data_dir=config.data.data_dir)
            equal["images"] = len(source)
            description += f", {len(source):,} images, the first {source[0].name}"
        with collect_fault(""):
            check(config)
    if workdir is not None:
        with collect_fault("--workdir"):
            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / f".doctor-{jax.process_index()}"
            write_atomic(path, b"written by umae_jax.doctor")
            path.unlink()
    return {"host": socket.gethostname(), "description": description, "equal": equal, "faults": faults}


def _time_sum() -> tuple[bool, float]:
    """Sum an array over all devices; return whether the sum is right, and the median seconds it takes."""
    devices = jax.device_count()
    sharding = NamedSharding(jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec("x"))
    index = functools.partial(jax.lax.broadcasted_iota, jnp.float32, (devices, FLOATS), 0)  # of each device
    array = jax.jit(index, out_shardings=sharding)()
    add = jax.jit(lambda array: array.sum(0), out_shardings=sharding.update(spec=PartitionSpec()))
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        total = jax.block_until_ready(add(array))
        seconds.append(time.perf_counter() - start)
    correct = bool((total.addressable_data(0) == sum(range(devices))).all())
    return correct, statistics.median(seconds[1:])  # the first call compiles


def diagnose(config: ConfigDict | None, workdir: AnyPath | None) -> list[tuple[bool, str]]:
    """Inspect all processes; return a line per finding, and whether it is as it should be."""
    processes = multihost.all_gather_json(_inspect_process(config, workdir))
    clocks = multihost.all_gather_json(time.time())
    correct, seconds = _time_sum()
    software = ", ".join(f"{name} {version}" for name, version in multihost.versions().items())
    findings = [(True, f"software: {software}")]
    for index, process in enumerate(processes):
        name = f"process {index} on {process['host']}"
        findings.append((True, f"{name}: {process['description']}"))
        findings += [(False, f"{name}: {fault}") for fault in process["faults"]]
    for key in ("devices", "images"):
        values = sorted({str(process["equal"].get(key)) for process in processes})
        if len(values) > 1:
            findings.append((False, f"{key} differ between processes: {', '.join(values)}"))
    if len(processes) > 1:
        difference = max(clocks) - min(clocks)
        findings.append((difference < MAX_CLOCK_DIFFERENCE, f"clocks differ by {difference:.2f} s"))
        findings.append((True, f"{len(processes)} processes share software, configuration and workdir"))
    speed = f"{seconds * 1e3:.1f} ms, {FLOATS * 4 / seconds / 1e9:.2f} GB/s"
    findings.append((correct, f"sum over {jax.device_count()} devices, {FLOATS * 4 >> 20} MiB each: {speed}"))
    return findings
