"""Where processes meet before JAX connects their devices: all are waited for, and compared.

JAX waits for a process without saying for which, and does not look at what each is about to compute.
"""

import contextlib
import hashlib
import platform
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from umae_jax.errors import UserError, listing
from umae_jax.files import AnyPath, explain, reason, write_whole
from umae_jax.processes.line import GRACE, Line
from umae_jax.processes.place import Place

TELL_EVERY = 10.0  # seconds between two lines about who is waited for
LOOK = 10.0  # seconds within which a shared file system shows what another host wrote
COMPARED = (  # versions
    *("umae_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain"),
    *("numpy", "pillow"),
)


class RemoteError(Exception):
    """Another process has failed, and process 0 says why."""


def versions() -> dict[str, str]:
    """The versions that processes which train together share."""
    there = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
            there[name] = metadata.version(name)
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    there["source code"] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return there


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


class Lobby:
    """Where process 0 waits for all the others, and lets them go on if they are about to do the same."""

    def __init__(self, greeting: Greeting, wait: float, say: Callable[[str], None]) -> None:
        self.greeting, self.place, self.wait, self.say = greeting, greeting.place, wait, say
        self.lines: dict[int, Line] = {}
        self.came: dict[int, dict[str, Any]] = {}
        self.strangers: dict[Line, float] = {}  # who has not greeted yet, and when that is too late

    def refuse(self, sentence: str) -> UserError:
        """Have all who are here know why they will not go on."""
        for line in (*self.lines.values(), *self.strangers):
            with contextlib.suppress(OSError):
                line.send(error=sentence)
        return UserError(sentence)

    def gather(self, silence: float) -> tuple[dict[int, Line], int]:
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
                        line = Line(server.accept()[0], GRACE)
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

    def _greet(self, line: Line, came: dict[str, Any]) -> None:
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

    def _forget(self, line: Line) -> None:
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
        except Exception as error:
            raise self.refuse(f"--workdir: {reason(error)}") from None
        try:
            for line in self.lines.values():
                line.send(look=mark.name)
            for index, line in self.lines.items():
                line.connection.settimeout(2 * LOOK)
                answer = line.next()
                if not answer.get("seen"):
                    why = f" ({answer['why']})" if answer.get("why") else ""
                    raise self.refuse(
                        f"{_name(index, self.came[index])} does not see what process 0 writes into {workdir}{why}; "
                        "name a --workdir that all of them share"
                    )
        finally:
            with contextlib.suppress(Exception):  # it is in nobody's way
                mark.unlink(missing_ok=True)


def reach(greeting: Greeting, wait: float, silence: float, say: Callable[[str], None]) -> tuple[Line, int]:
    """Any other process: find process 0, and wait until it says that all are there, and the port for JAX."""
    place = greeting.place
    where = f"{place.host}:{place.port}"
    start = told = time.monotonic()
    while True:
        try:
            address = (place.host.strip("[]"), place.port)
            line = Line(socket.create_connection(address, timeout=GRACE), silence)
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
                raise RemoteError(message["error"])
            seen, why = _appears((greeting.workdir or Path()) / str(message.get("look")))
            line.send(seen=seen, why=why)
    except OSError:
        raise UserError(f"process 0 at {where} left before all processes had come; see why in its own log") from None
    line.connection.settimeout(silence)
    return line, int(message["go"])


def _appears(path: AnyPath) -> tuple[bool, str]:
    """Whether a file comes to be seen here, and what keeps this process from looking, if something does."""
    end = time.monotonic() + LOOK
    try:
        while not path.exists():
            if time.monotonic() > end:
                return False, ""
            time.sleep(0.1)
    except Exception as error:  # of the file system, or of whatever reaches a bucket
        return False, explain(error) or f"{type(error).__name__}: {error}"
    return True, ""
