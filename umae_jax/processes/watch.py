"""How each process learns that another has failed or is gone, while it waits for what all compute together.

JAX aborts with a page of its own log then. So the connections of the lobby stay: who closes one without a word, or is
silent for too long, is gone, and all leave.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import selectors
import socket
import threading
import time
from typing import Any, NoReturn

import jax

from umae_jax.processes.line import GRACE, Line
from umae_jax.processes.place import Place

BEAT = 1.0  # seconds between two signs of life


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

    def __init__(self, place: Place, lines: dict[int, Line], silence: float) -> None:
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
