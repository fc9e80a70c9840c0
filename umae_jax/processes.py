"""Several processes that train together: how they meet, and how each learns that another has failed or is gone.

JAX connects their devices, but it waits for a process without saying for which, and aborts with a page of its own log
where one is gone. So they first meet at process 0, which listens one port above JAX's and compares what all of them are
about to do. The connections stay: who closes one without a word, or is silent for too long, is gone, and all leave.
Messages are JSON, one a line.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import clusters  # finds Cloud TPU pods, SLURM and others; public only inside jax.distributed.initialize

from umae_jax.errors import UserError, listing, require

BEAT = 1.0  # seconds between two signs of life
TELL_EVERY = 10.0  # seconds between two lines about who is waited for
GRACE = 3.0  # seconds in which process 0 may come upon the failure that another reports
LONGEST = 1 << 20  # bytes of a message
COMPARED = ("umae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "pillow")  # versions


class Told(Exception):  # noqa: N818 - not an error of this process
    """Another process has failed, and process 0 says why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        host, port: where process 0 listens for JAX; it listens for us one port above.
        count: of processes.
        index: of this one.
        devices: of this host, that are this process's; None for all.
    """

    host: str
    port: int
    count: int
    index: int
    devices: Sequence[int] | None = None


def find_place(coordinator: str | None, count: int | None, index: int | None, wait: int) -> Place | None:
    """This process's place: as told, or as Cloud TPU, SLURM and others tell; None where it is alone.

    Args:
        coordinator: HOST:PORT of process 0.
        count: of processes.
        index: of this process.
        wait: seconds to look for the coordinator.

    Raises:
        UserError: if it is told by halves, or wrongly.
    """
    if count == 1:
        return None
    told = (coordinator, count, index)
    if told == (None, None, None):
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, wait)
        except Exception as error:  # whatever a cluster's own ways of telling raise
            raise UserError(
                f"the other processes could not be found ({error}); name them by --coordinator, --processes and "
                "--process, or write --processes=1 to train alone"
            ) from None
        coordinator, count, index, devices = found
        if coordinator is None or count is None or index is None or count == 1:
            return None
    else:
        devices = None
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --processes and --process belong together; write all three, or none")
    host, _, port = coordinator.rpartition(":")
    require(
        bool(host) and port.isdecimal() and 0 < int(port) < 65535,
        f"--coordinator: {coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476",
    )
    require(0 <= index < count, f"--process: {index} does not lie in 0..{count - 1}")
    return Place(host.strip("[]"), int(port), count, index, devices)


def versions() -> dict[str, str]:
    """The versions that processes which train together share."""
    there = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
            there[name] = metadata.version(name)
    return there


class _Line:
    """Messages over a socket."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        self.connection = connection
        self.heard = time.monotonic()
        self._rest = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:  # noqa: ANN401 - whatever JSON holds
        with self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has come, waiting for something to come.

        Raises:
            OSError: if nothing will, or what came is none of our messages.
        """
        data = self.connection.recv(1 << 16)
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ConnectionError("not a message") from None
        if not data or len(self._rest) > LONGEST or not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("closed")
        return messages

    def first(self) -> dict[str, Any]:
        """The first message."""
        while not (messages := self.receive()):
            pass
        return messages[0]


class Greeting(NamedTuple):
    """What a process is about to do; all must be about to do the same.

    Attributes:
        place: of the process.
        doing: the command, the versions it runs by, and its configuration, by name.
        workdir: the directory that all write to; None if nothing is written.
    """

    place: Place
    doing: dict[str, Any]
    workdir: Path | None = None


def _name(index: int, host: str) -> str:
    return f"process {index} on {host}"


def difference(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> str | None:
    """What another process does otherwise than process 0, as a sentence."""
    different = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if not different:
        return None
    told = [f"{key} {theirs.get(key)} where process 0 has {ours.get(key)}" for key in different]
    return f"{name} has {listing(told, 3)}; start all processes with the same software and the same command"


def _open(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _gather(greeting: Greeting, wait: float, silence: float, say: Callable[[str], None]) -> dict[int, _Line]:
    """Process 0: wait for all others, and let them go on if they are about to do the same."""
    place = greeting.place
    lines: dict[int, _Line] = {}
    greetings: dict[int, dict[str, Any]] = {}

    def refuse(sentence: str) -> UserError:
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.send(error=sentence)
        return UserError(sentence)

    try:
        # JAX's service would abort this process if its port were taken.
        _open(place.port).close()
        server = _open(place.port + 1)
    except OSError as error:
        raise UserError(
            f"--coordinator: port {place.port} or {place.port + 1} of this host cannot be used ({error.strerror}); "
            "choose another port, and leave the one above it free too"
        ) from None
    start = told = time.monotonic()
    with server:
        while missing := [index for index in range(1, place.count) if index not in lines]:
            now = time.monotonic()
            whom = f"process(es) {listing([str(index) for index in missing], 8)} of {place.count}"
            if now - start > wait:
                raise refuse(
                    f"{whom} did not come to {place.host}:{place.port + 1} within {wait:.0f} s; see why in their own "
                    "logs, and that nothing keeps them from reaching this host and port"
                )
            if now - told > TELL_EVERY:
                told = now
                say(f"waiting for {whom} at {place.host}:{place.port + 1}")
            server.settimeout(0.5)
            with contextlib.suppress(OSError):  # nobody came, or somebody who is none of us
                line = _Line(server.accept()[0], GRACE)
                came = line.first()
                index = came.get("index")
                if not isinstance(index, int):
                    continue
                name = _name(index, str(came.get("host")))
                if came.get("count") != place.count or not 0 < index < place.count or index in lines:
                    lines[-1] = line
                    raise refuse(
                        f"{name} came as one of {came.get('count')}, and process 0 waits for 1 to {place.count - 1} of "
                        f"{place.count}, one each; give each process its own --process and all the same --processes"
                    )
                lines[index], greetings[index] = line, came
    for index, came in greetings.items():
        if sentence := difference(greeting.doing, came["doing"], _name(index, came["host"])):
            raise refuse(sentence)
    _check_shared(greeting.workdir, lines, greetings, refuse)
    for line in lines.values():
        line.connection.settimeout(silence)
        line.send(go=True)
    return lines


def _check_shared(
    workdir: Path | None,
    lines: dict[int, _Line],
    greetings: dict[int, dict[str, Any]],
    refuse: Callable[[str], UserError],
) -> None:
    """Process 0: check that the others see what it writes."""
    if workdir is None:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    mark = workdir / f".shared-{secrets.token_hex(8)}"
    mark.touch()
    try:
        for line in lines.values():
            line.send(look=mark.name)
        for index, line in lines.items():
            line.connection.settimeout(LOOK * 2)
            if not line.first().get("seen"):
                raise refuse(
                    f"{_name(index, greetings[index]['host'])} does not see what process 0 writes into {workdir}; "
                    "name a --workdir that all of them share, such as a bucket or a network file system"
                )
    except OSError:
        raise refuse("a process left while all compared what they see; see why in its own log") from None
    finally:
        mark.unlink(missing_ok=True)


LOOK = 10.0  # seconds within which a shared file system shows what another host wrote


def _reach(greeting: Greeting, wait: float, silence: float, say: Callable[[str], None]) -> _Line:
    """Any other process: find process 0, and wait until it says that all are there."""
    place = greeting.place
    where = f"{place.host}:{place.port + 1}"
    start = told = time.monotonic()
    while True:
        try:
            line = _Line(socket.create_connection((place.host, place.port + 1), timeout=GRACE), silence)
            break
        except OSError as error:
            now = time.monotonic()
            if now - start > wait:
                raise UserError(
                    f"process 0 cannot be reached at {where} ({error.strerror or error}); start it first, check "
                    "--coordinator, and that nothing keeps this host from reaching that port"
                ) from None
            if now - told > TELL_EVERY:
                told = now
                say(f"process {place.index} is waiting for process 0 at {where} ({error.strerror or error})")
            time.sleep(0.5)
    try:
        line.send(index=place.index, count=place.count, host=socket.gethostname(), doing=greeting.doing)
        line.connection.settimeout(wait + LOOK * 2)
        while "go" not in (message := line.first()):
            if "error" in message:
                raise Told(message["error"])
            line.send(seen=_appears((greeting.workdir or Path()) / message["look"]))
    except OSError:
        raise UserError(f"process 0 at {where} left before all processes had come; see why in its own log") from None
    line.connection.settimeout(silence)
    return line


def _appears(path: Path) -> bool:
    end = time.monotonic() + LOOK
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


class Processes:
    """The processes of a run, seen from one of them.

    A thread of its own listens, and ends this process if another has failed: whoever waits for a computation that the
    others have left cannot be called back otherwise.

    Args:
        place: of this process.
        lines: to the others; from them, to process 0 alone.
        silence: seconds after which a process that says nothing is held to be gone.
    """

    def __init__(self, place: Place, lines: dict[int, _Line], silence: float) -> None:
        self.place = place
        self._lines = lines
        self._silence = silence
        self._leaving = threading.Event()
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        beat = min(BEAT, self._silence / 4)
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line.connection, selectors.EVENT_READ, index)
            while self._lines and not self._left.is_set():
                for key, _ in selector.select(beat):
                    index = key.data
                    try:
                        messages = self._lines[index].receive()
                    except OSError:
                        self._lost(index, "")
                        messages = [{"bye": True}]
                    for message in messages:
                        if "error" in message:
                            self._failed(index, message)
                        if "bye" in message:
                            selector.unregister(key.fileobj)
                            del self._lines[index]
                for index, line in list(self._lines.items()):
                    with contextlib.suppress(OSError):  # the next one to receive finds out
                        line.send(alive=True)
                    silent = time.monotonic() - line.heard
                    if silent > self._silence:
                        self._lost(index, f", silent for {silent:.0f} s")

    def _lost(self, index: int, how: str) -> None:
        if self._leaving.is_set():
            return
        self._end(
            f"process {index} of {self.place.count} is gone{how}; its own log may tell why; start all processes again, "
            "which continues from the newest checkpoint",
            1,
            tell=True,
        )

    def _failed(self, index: int, message: dict[str, Any]) -> None:
        """Another process says why it, or another one, failed."""
        if self.place.index == 0:
            if self._leaving.wait(GRACE):
                return  # for the same reason, as a rule
            sentence = f"process {index} on {message['host']}: {message['error']}"
            self._end(sentence, message["status"], tell=True)
        self._end(message["error"], message["status"], tell=False)

    def _end(self, sentence: str, status: int, *, tell: bool) -> None:
        """Tell everyone, and end this process from whatever thread; never returns."""
        self._ending.acquire()  # for good: the first to end this process is the only one
        if tell:
            os.write(2, f"error: {sentence}\n".encode())
        self._spread(sentence, status)
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(status)

    def _spread(self, sentence: str, status: int) -> None:
        """Have the others know, and wait until they have left: what is sent is lost where a process ends too soon."""
        lines = list(self._lines.values())
        for line in lines:
            with contextlib.suppress(OSError):
                line.send(error=sentence, status=status, host=socket.gethostname())
        end = time.monotonic() + 2 * GRACE
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * GRACE)
            return
        for line in lines:
            with contextlib.suppress(OSError):
                while True:
                    line.connection.settimeout(max(0.1, end - time.monotonic()))
                    line.receive()

    def fail(self, sentence: str, status: int) -> None:
        """End this process for a reason, which process 0 tells; never returns."""
        self._leaving.set()
        self._end(sentence, status, tell=self.place.index == 0 or not self._lines)

    def await_news(self) -> None:
        """Wait whether another process is gone, of which what happened here would be but the echo."""
        time.sleep(GRACE)

    def leave(self) -> None:
        """Leave in good order, when all do."""
        self._leaving.set()
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.send(bye=True)
        self._left.set()


_joined: Processes | None = None


def joined() -> Processes | None:
    """The processes that this one has joined."""
    return _joined


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return _joined is None or _joined.place.index == 0


def join(
    place: Place | None,
    doing: dict[str, Any],
    *,
    workdir: Path | None = None,
    wait: int,
    silence: float,
    say: Callable[[str], None],
) -> None:
    """Meet the other processes, and connect their devices; nothing is done where there are none.

    Args:
        place: of this process; None if it is alone.
        doing: what it is about to do, by name; must be the same in all.
        workdir: the directory that all write to.
        wait: seconds to wait for the others.
        silence: seconds after which a process that says nothing is held to be gone.
        say: tells the user.

    Raises:
        UserError: if the others do not come, or are about to do something else.
        Told: if process 0 tells that.
    """
    global _joined
    if place is None:
        return
    greeting = Greeting(place, {**versions(), **doing}, workdir)
    if place.index == 0:
        lines = _gather(greeting, wait, silence, say)
    else:
        lines = {0: _reach(greeting, wait, silence, say)}
    _joined = Processes(place, lines, silence)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `signals`
    jax.distributed.initialize(
        f"{place.host}:{place.port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        initialization_timeout=wait,
        # Ours comes first: it can say what has happened.
        heartbeat_timeout_seconds=round(10 * silence) + 100,
    )
