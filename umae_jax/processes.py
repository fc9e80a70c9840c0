"""Several processes that train together: how they meet, and how each learns that another has failed or is gone.

JAX connects their devices, but it waits for a process without saying for which, and aborts with a page of its own log
where one is gone. So they first meet at process 0, which compares what all of them are about to do. The connections
stay: who closes one without a word, or is silent for too long, is gone, and all leave. Messages are JSON, one a line.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import secrets
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import clusters  # finds Cloud TPU pods, SLURM and others; public only inside jax.distributed.initialize

from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath, write_whole

BEAT = 1.0  # seconds between two signs of life
TELL_EVERY = 10.0  # seconds between two lines about who is waited for
GRACE = 3.0  # seconds in which process 0 may come upon the failure that another reports
LONGEST = 1 << 20  # bytes of a message
LOOK = 10.0  # seconds within which a shared file system shows what another host wrote
COMPARED = (  # versions
    *("umae_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain"),
    *("numpy", "pillow"),
)
# In a Kubernetes pod that is no part of a job JAX finds no others, but warns or fails.
IN_A_JOB = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "SLURM_JOB_ID"}


class Told(Exception):  # noqa: N818 - not an error of this process
    """Another process has failed, and process 0 says why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        host, port: where process 0 listens.
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
        if "KUBERNETES_SERVICE_HOST" in os.environ and not IN_A_JOB & os.environ.keys():
            return None
        try:
            with warnings.catch_warnings(action="ignore"):
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
        bool(host) and port.isdecimal() and 0 < int(port) < 65536,
        f"--coordinator: {coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476",
    )
    require(0 <= index < count, f"--process: {index} does not lie in 0..{count - 1}")
    return Place(host, int(port), count, index, devices)


def versions() -> dict[str, str]:
    """The versions that processes which train together share."""
    there = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
            there[name] = metadata.version(name)
    files = sorted(Path(__file__).parent.rglob("*.py"))
    there["source code"] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return there


class _Line:
    """Messages over a socket."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        self.connection = connection
        self.heard = time.monotonic()
        self._rest = b""
        self._kept: list[dict[str, Any]] = []
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
        except (ValueError, RecursionError):
            raise ConnectionError("not a message") from None
        if not data or len(self._rest) > LONGEST or not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("closed")
        return messages

    def next(self) -> dict[str, Any]:
        """The next message; those behind it are kept for `kept`."""
        while not self._kept:
            self._kept += self.receive()
        return self._kept.pop(0)

    def kept(self) -> list[dict[str, Any]]:
        """What came behind the last message asked for."""
        kept, self._kept = self._kept, []
        return kept


class Greeting(NamedTuple):
    """What a process is about to do; all must be about to do the same.

    Attributes:
        place: of the process.
        doing: the command, the versions it runs by, and its configuration, by name.
        workdir: the directory that all write to; None if nothing is written.
    """

    place: Place
    doing: dict[str, Any]
    workdir: AnyPath | None = None


def _name(index: int, came: dict[str, Any]) -> str:
    return f"process {index} on {came.get('host')}"


def difference(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> str | None:
    """What another process does otherwise than process 0, as a sentence."""
    different = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if not different:
        return None
    told = [f"{key} {theirs.get(key)} where process 0 has {ours.get(key)}" for key in different]
    return f"{name} has {listing(told, 3)}; start all processes with the same software and the same command"


def _listen_at(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _port_for_jax(near: int) -> int:
    """The port above, or any that is free."""
    for port in (near + 1, 0):
        with contextlib.suppress(OSError, OverflowError), _listen_at(port) as server:
            return server.getsockname()[1]
    raise UserError("--coordinator: this host has no free port")


class _Lobby:
    """Where process 0 waits for all the others, and lets them go on if they are about to do the same."""

    def __init__(self, greeting: Greeting, wait: float, say: Callable[[str], None]) -> None:
        self.greeting, self.place, self.wait, self.say = greeting, greeting.place, wait, say
        self.lines: dict[int, _Line] = {}
        self.came: dict[int, dict[str, Any]] = {}
        self.strangers: dict[_Line, float] = {}  # who has not greeted yet, and when that is too late

    def refuse(self, sentence: str) -> UserError:
        """Have all who are here know why they will not go on."""
        for line in (*self.lines.values(), *self.strangers):
            with contextlib.suppress(OSError):
                line.send(error=sentence)
        return UserError(sentence)

    def gather(self, silence: float) -> tuple[dict[int, _Line], int]:
        """The lines to all others, and the port for JAX.

        Raises:
            UserError: if they do not come, or are about to do something else.
        """
        try:
            server = _listen_at(self.place.port)
        except OSError as error:
            raise UserError(
                f"--coordinator: port {self.place.port} of this host cannot be used ({error.strerror}); choose another"
            ) from None
        with server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            self._wait_for_all(server, selector)
        try:
            for index, came in self.came.items():
                doing = came["doing"] if isinstance(came.get("doing"), dict) else {}
                if sentence := difference(self.greeting.doing, doing, _name(index, came)):
                    raise self.refuse(sentence)
            self._check_shared()
            port = _port_for_jax(self.place.port)
            for line in self.lines.values():
                line.connection.settimeout(silence)
                line.send(go=port)
        except ConnectionError:
            raise self.refuse("a process left while all compared what they do; see why in its own log") from None
        except TimeoutError:
            raise self.refuse("a process fell silent while all compared what they do; start them again") from None
        return self.lines, port

    def _wait_for_all(self, server: socket.socket, selector: selectors.BaseSelector) -> None:
        where = f"{self.place.host}:{self.place.port}"
        start = told = time.monotonic()
        while missing := [index for index in range(1, self.place.count) if index not in self.lines]:
            now = time.monotonic()
            whom = f"process(es) {listing([str(index) for index in missing], 8)} of {self.place.count}"
            if now - start > self.wait:
                raise self.refuse(
                    f"{whom} did not come to {where} within {self.wait:.0f} s; see why in their own logs, and that "
                    "nothing keeps them from reaching this host and port"
                )
            if now - told > TELL_EVERY:
                told = now
                self.say(f"waiting for {whom} at {where}")
            for key, _ in selector.select(0.5):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):  # who knocked is gone
                        line = _Line(server.accept()[0], GRACE)
                        self.strangers[line] = now + GRACE
                        selector.register(line.connection, selectors.EVENT_READ, line)
                    continue
                try:
                    for message in key.data.receive():
                        self._greet(key.data, message)
                except OSError:  # none of us, or one that may be started again
                    selector.unregister(key.fileobj)
                    self._forget(key.data)
            for line in [line for line, late in self.strangers.items() if now > late]:
                selector.unregister(line.connection)
                self._forget(line)

    def _greet(self, line: _Line, came: dict[str, Any]) -> None:
        index, count = came.get("index"), came.get("count")
        if not isinstance(index, int):
            raise ConnectionError("none of us")
        if count != self.place.count or not 0 < index < self.place.count or index in self.lines:
            raise self.refuse(
                f"{_name(index, came)} came as one of {count}, and process 0 waits for 1 to {self.place.count - 1} of "
                f"{self.place.count}, one each; give each process its own --process and all the same --processes"
            )
        self.strangers.pop(line, None)
        self.lines[index], self.came[index] = line, came

    def _forget(self, line: _Line) -> None:
        line.connection.close()
        self.strangers.pop(line, None)
        for index in [index for index, other in self.lines.items() if other is line]:
            del self.lines[index], self.came[index]

    def _check_shared(self) -> None:
        """Check that the others see what this process writes."""
        workdir = self.greeting.workdir
        if workdir is None:
            return
        mark = workdir / f".shared-{secrets.token_hex(8)}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(mark, b"")
        except UserError as error:
            raise self.refuse(f"--workdir: {error}") from None
        except OSError as error:
            raise self.refuse(f"{error.filename}: {error.strerror}; mend that or name another --workdir") from None
        try:
            for line in self.lines.values():
                line.send(look=mark.name)
            for index, line in self.lines.items():
                line.connection.settimeout(2 * LOOK)
                if not line.next().get("seen"):
                    raise self.refuse(
                        f"{_name(index, self.came[index])} does not see what process 0 writes into {workdir}; "
                        "name a --workdir that all of them share"
                    )
        finally:
            mark.unlink(missing_ok=True)


def _reach(greeting: Greeting, wait: float, silence: float, say: Callable[[str], None]) -> tuple[_Line, int]:
    """Any other process: find process 0, and wait until it says that all are there, and the port for JAX."""
    place = greeting.place
    where = f"{place.host}:{place.port}"
    start = told = time.monotonic()
    while True:
        try:
            address = (place.host.strip("[]"), place.port)
            line = _Line(socket.create_connection(address, timeout=GRACE), silence)
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
        line.connection.settimeout(wait + 2 * LOOK)
        while "go" not in (message := line.next()):
            if "error" in message:
                raise Told(message["error"])
            line.send(seen=_appears((greeting.workdir or Path()) / str(message.get("look"))))
    except OSError:
        raise UserError(f"process 0 at {where} left before all processes had come; see why in its own log") from None
    line.connection.settimeout(silence)
    return line, int(message["go"])


def _appears(path: Path) -> bool:
    end = time.monotonic() + LOOK
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@dataclasses.dataclass
class _End:
    """An end that has begun: why, with which status, and when it is over at the latest."""

    sentence: str
    status: int
    late: float


class Processes:
    """The processes of a run, seen from one of them.

    A thread of its own listens, and ends this process if another has failed: whoever waits for a computation that the
    others have left cannot be called back otherwise. Process 0 says why and lets all know, each of whom ends at once.

    Args:
        place: of this process.
        lines: to the others; from them, to process 0 alone.
        silence: seconds after which a process that says nothing is held to be gone.
    """

    def __init__(self, place: Place, lines: dict[int, _Line], silence: float) -> None:
        self.place = place
        self._lines = lines
        self._silence = silence
        self._ending: _End | None = None
        self._reported: _End | None = None  # process 0: what another came upon, and it may come upon itself
        self._deciding = threading.Lock()
        self._byes: set[int] = set()
        self._done: set[int] = set()  # who said so, and will say nothing more
        self._left = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # nobody would be watching
            self._tell(f"watching the other processes failed ({type(error).__name__}: {error})")
            _exit(1)

    def _watch(self) -> None:
        beat = min(BEAT, self._silence / 4)
        next_beat = now = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for index, line in list(self._lines.items()):
                line.heard = now
                selector.register(line.connection, selectors.EVENT_READ, index)
                for message in line.kept():
                    self._take(index, message)
            passed = time.monotonic()
            while not self._left.is_set():
                for key, _ in selector.select(max(0.0, next_beat - time.monotonic())):
                    index = key.data
                    try:
                        messages = self._lines[index].receive()
                    except OSError:
                        messages = [{"closed": True}]
                    for message in messages:
                        self._take(index, message)
                    if index not in self._open():
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - passed > self._silence / 2:  # it was this process that was held up, or suspended
                    for line in list(self._lines.values()):
                        line.heard = now
                passed = now
                if now >= next_beat:
                    next_beat = now + beat
                    for index, line in list(self._lines.items()):
                        with contextlib.suppress(OSError):  # the next one to receive finds out
                            line.send(alive=True)
                        if now - line.heard > self._silence and index not in self._byes:
                            self._lost(index, f", silent for {now - line.heard:.0f} s")
                if self._reported and now > self._reported.late:
                    self._end(self._reported.sentence, self._reported.status)
                if self._ending and (not self._open() or now > self._ending.late):
                    if self.place.index and self._open():  # process 0 has not taken it
                        self._tell(self._ending.sentence)
                    _exit(self._ending.status)

    def _open(self) -> set[int]:
        """Who may still say something."""
        return set(self._lines) - self._done

    def _take(self, index: int, message: dict[str, Any]) -> None:
        """What another process says."""
        if index not in self._open():
            return
        if "bye" in message:
            self._byes.add(index)
        if "closed" in message:
            if index in self._byes:
                self._done.add(index)
            else:
                self._lost(index, "")
        if "error" in message:
            status = int(message.get("status", 1))
            if self.place.index:  # process 0 has said why
                _exit(status)
            if not self._reported:
                sentence = f"process {index} on {message.get('host')}: {message['error']}"
                self._reported = _End(sentence, status, time.monotonic() + GRACE)

    def _lost(self, index: int, how: str) -> None:
        del self._lines[index]
        if self._ending:
            if self.place.index:  # nobody is left to say it
                self._tell(self._ending.sentence)
            return
        if self._reported:
            return
        self._end(
            f"process {index} of {self.place.count} is gone{how}; its own log may tell why; start all processes again, "
            "which continues from the newest checkpoint",
            1,
        )

    def _end(self, sentence: str, status: int) -> None:
        """Begin to end: say why, and let the others know. The thread that listens ends the process."""
        with self._deciding:
            if self._ending:
                return
            self._ending = _End(sentence, status, time.monotonic() + 2 * GRACE)
        if self.place.index == 0 or not self._lines:
            self._tell(sentence)
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.send(error=sentence, status=status, host=socket.gethostname())

    def _tell(self, sentence: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"error: {sentence}\n".encode())

    def fail(self, sentence: str, status: int) -> NoReturn:
        """End this process for a reason, which process 0 tells."""
        self._end(sentence, status)
        time.sleep(3 * GRACE)  # the thread that listens is quicker
        _exit(status)

    def await_news(self) -> None:
        """Wait whether another process is gone, of which what happened here would be but the echo."""
        time.sleep(GRACE)

    def leave(self) -> None:
        """Leave in good order, when all do; waits for them, and goes on watching until then."""
        try:
            jax.distributed.shutdown()
        except RuntimeError:
            self.await_news()
        for line in list(self._lines.values()):
            with contextlib.suppress(OSError):
                line.send(bye=True)
                line.connection.shutdown(socket.SHUT_WR)
        # Until all have been heard to the end: who closes with something unread takes his own last words back.
        late = time.monotonic() + 2 * GRACE
        while self._open() and time.monotonic() < late:
            time.sleep(0.01)
        self._left.set()


def _exit(status: int) -> NoReturn:
    """End this process from whatever thread, with what it started."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(status)


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
    workdir: AnyPath | None = None,
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
        lines, port = _Lobby(greeting, wait, say).gather(silence)
    else:
        line, port = _reach(greeting, wait, silence, say)
        lines = {0: line}
    _joined = Processes(place, lines, silence)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `signals`
    jax.distributed.initialize(
        f"{place.host}:{port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",  # the place is known
        initialization_timeout=wait,
        # Ours comes first: it can say what has happened.
        heartbeat_timeout_seconds=round(10 * silence) + 100,
    )
