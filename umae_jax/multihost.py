"""Several processes that train together, connected by JAX's coordination service.

JAX detects Cloud TPU, GKE, SLURM and Open MPI; there no flags are needed. If a process is lost, JAX ends the others: at
once if a connection breaks, otherwise after --heartbeat_timeout.
"""

import contextlib
import faulthandler
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

from umae_jax.cluster_flags import ClusterFlags
from umae_jax.errors import PreemptionRequested, UserError, listing, require
from umae_jax.files import AnyPath, explain, first_line, write_atomic

NOTICE_SECONDS = 10.0  # a longer wait for other processes is reported
VISIBLE_SECONDS = 10.0  # max delay until a shared file system shows another host's file
EXIT_SECONDS = 10.0  # max time that a failed process waits for the others
PACKAGES = (
    *("umae_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain"),
    *("numpy", "pillow"),
)


def initialize(cluster: ClusterFlags, *, preemption: bool = False) -> None:
    """Connect the processes that the flags or the cluster name; do nothing for a single process.

    Call it before JAX creates its devices. If a process is missing after --initialization_timeout, JAX aborts the
    others, with an error that lists the missing ones.

    Args:
        cluster: the flags.
        preemption: let JAX handle SIGTERM, which `StopSignal` needs; otherwise SIGTERM ends the process as usual.

    Raises:
        UserError: if the flags are wrong or incomplete, or the processes cannot be connected.
    """
    address, count, index = cluster.coordinator_address.value, cluster.num_processes.value, cluster.process_id.value
    if count == 1:
        return
    require(
        len({value is None for value in (address, count, index)}) == 1,
        "--coordinator_address, --num_processes and --process_id belong together; set all or none",
    )
    if address is not None and count is not None and index is not None:
        require(
            re.fullmatch(r".+:\d{1,5}", address) is not None and 0 < int(address.rpartition(":")[2]) < 65536,
            f"--coordinator_address: {address!r} is not HOST:PORT, such as 10.0.0.1:8476",
        )
        require(index < count, f"--process_id: {index} is not in 0..{count - 1}")
    jax.config.update("jax_enable_preemption_service", preemption)
    timeout = cluster.initialization_timeout.value
    try:
        with _report_missing_processes(timeout), warnings.catch_warnings(action="ignore"):
            jax.distributed.initialize(
                address,
                count,
                index,
                cluster_detection_method="deactivate" if address else None,
                initialization_timeout=timeout + 5,  # the service times out first: its error lists missing processes
                heartbeat_timeout_seconds=cluster.heartbeat_timeout.value,
            )
    except Exception as error:  # network errors and failed cluster detection have many types
        if isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # JAX detected no cluster
        raise UserError(
            f"the processes cannot be connected ({first_line(error)}); set --coordinator_address, --num_processes and "
            "--process_id, or --num_processes=1 to run alone"
        ) from None


@contextlib.contextmanager
def _report_missing_processes(timeout: int) -> Iterator[None]:
    """Report a long wait, and make the coordination service list the processes missing after `timeout` seconds.

    JAX applies its initialization timeout only to the clients, whose error names no process. The service's error names
    the missing ones, but its own timeout, one hour, has no public setting.
    """
    line = f'still waiting for other processes, up to {timeout} s; JAX then aborts and lists "timed out task names"\n'
    notice = threading.Timer(NOTICE_SECONDS, os.write, (2, line.encode()))
    notice.daemon = True
    notice.start()
    module: Any = getattr(jaxlib, "_jax", None)  # private; if JAX drops it, only the names are lost
    create = getattr(module, "get_distributed_runtime_service", None)
    try:
        if create:
            module.get_distributed_runtime_service = functools.partial(create, cluster_register_timeout=timeout)
        yield
    finally:
        if create:
            module.get_distributed_runtime_service = create
        notice.cancel()


def is_primary() -> bool:
    """Return whether this is process 0, the only one that prints and writes files."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def all_gather_json(value: Any) -> list[Any]:  # noqa: ANN401 - any JSON
    """Return the JSON values of all processes by index; all processes must call it, in the same order."""
    data = json.dumps(value).encode()
    size = multihost_utils.process_allgather(np.int32(len(data))).max()
    padded = np.frombuffer(data.ljust(size), np.uint8)  # JSON ignores trailing spaces
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def broadcast_json(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return the JSON value of process 0; all processes must call it, in the same order."""
    return all_gather_json(value)[0]


def versions() -> dict[str, str]:
    """Return the version of each package that affects results, by name, and a hash of this package's source code."""
    by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            by_name[name] = metadata.version(name)
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return by_name | {"source code": hashlib.sha256(source).hexdigest()[:12]}


def check_agreement(fingerprint: dict[str, Any], workdir: AnyPath | None) -> None:
    """Check that all processes run the same software with the same settings, and share the workdir.

    Args:
        fingerprint: settings of this process by name; JSON values.
        workdir: the directory that all processes write to, if any.

    Raises:
        UserError: in every process, naming the first process that differs.
    """
    if jax.process_count() == 1:
        return
    hosts = all_gather_json([socket.gethostname(), {**versions(), **fingerprint}])
    _, reference = hosts[0]
    for index, (host, values) in enumerate(hosts):
        keys = [key for key in sorted({*reference, *values}) if reference.get(key) != values.get(key)]
        different = [f"{key} {values.get(key)} where process 0 has {reference.get(key)}" for key in keys]
        require(
            not different,
            f"process {index} on {host} has {listing(different, 3)}; start all with the same software and command",
        )
    if workdir is None:
        return
    marker, failure = workdir / f".shared-{secrets.token_hex(8)}", ""
    if is_primary():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomic(marker, b"")
        except Exception as error:
            failure = explain(error) or first_line(error)
    name, failure = broadcast_json([marker.name, failure])
    require(not failure, f"--workdir: {failure}")
    visible = all_gather_json(_wait_until_visible(workdir / name))
    if is_primary():
        marker.unlink(missing_ok=True)
    failed = [f"process {index} on {host}" for index, (host, _) in enumerate(hosts) if not visible[index]]
    require(
        not failed,
        f"--workdir: {listing(failed, 3)} cannot see the files of process 0 in {workdir}; share it among all processes",
    )


def _wait_until_visible(path: AnyPath) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # an error counts as not visible
            if path.exists():
                return True
        time.sleep(0.1)
    return False


class StopSignal:
    """Context manager that asks a run to save and exit on SIGTERM or SIGINT.

    A single process does so from `listen` on, at the next poll. Several processes exit at the same poll, whichever
    received the signal: JAX's preemption service handles SIGTERM, from `initialize` on, and receives SIGINT as SIGTERM.
    A second signal has its previous effect; with several processes a second SIGTERM once all processes have agreed.

    Attributes:
        received: signal number once the run should exit, else None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._multiprocess = jax.process_count() > 1
        # JAX stops all processes at one number. Polls count from 1, steps of a resumed run do not: a signal before the
        # first poll would never take effect.
        self._polls = 0
        self._announced = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if self._multiprocess:
            self._install(signal.SIGINT)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give signals their previous effect: everything is saved."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def listen(self) -> None:
        """Handle signals of a single process from now on; call it once there is a step to save."""
        if not self._multiprocess:
            self._install(signal.SIGTERM, signal.SIGINT)

    def _install(self, *numbers: int) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._announced:  # the second signal
            self.release()
            signal.raise_signal(number)
            return
        self._announce(number)
        if self._multiprocess:
            signal.raise_signal(signal.SIGTERM)
        else:
            self.received = number

    def _announce(self, number: int) -> None:
        self._announced = True
        line = f"{signal.Signals(number).name}: saving and exiting after this step; repeat it to exit at once\n"
        os.write(2, line.encode())  # unlike print, safe in a signal handler

    def poll(self) -> int | None:
        """Return the signal number if the run should save and exit before the next step, else None.

        All processes must call `poll` and `check` equally often, in the same order.
        """
        if self._multiprocess and self.received is None:
            self._polls += 1
            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.received = signal.SIGTERM
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if is_primary():
                    self._announce(signal.SIGTERM)
        return self.received

    def check(self) -> None:
        """Raise PreemptionRequested if the run should save and exit; call it in long evaluations."""
        if self.poll() is not None:
            raise PreemptionRequested


class Watchdog:
    """Ends the process, with a traceback of every thread and status 1, if a step takes more than `seconds`.

    Heartbeats do not detect a process that is alive but stuck in a collective. None or 0 seconds: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def arm(self) -> None:
        """Start or restart the timer of a step."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def cancel(self) -> None:
        """Stop the timer."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()


def limit_exit() -> None:
    """End this process, with status 1, if it has not ended after EXIT_SECONDS.

    A process that fails alone waits at JAX's shutdown barrier for the others, which wait for it in a collective.
    """
    if jax.distributed.is_initialized():
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
