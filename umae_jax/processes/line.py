"""Messages between two processes: JSON, one a line."""

import json
import socket
import threading
import time
from typing import Any

GRACE = 3.0  # seconds in which an answer that needs no work comes
LONGEST = 1 << 20  # bytes of a message


class Line:
    """Messages over a socket."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        self.connection = connection
        self.heard = time.monotonic()
        self._rest = b""
        self._kept: list[dict[str, Any]] = []
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:  # noqa: ANN401 - whatever JSON holds
        """Say something, all of it."""
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
