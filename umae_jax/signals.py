"""Leaving when asked to: SIGTERM and SIGINT are remembered, and obeyed between two steps."""

import os
import signal
from types import FrameType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT)


class PreemptionRequested(Exception):  # noqa: N818 - not an error
    """Something that takes long between two steps broke off, as a signal asked to leave."""


class StopSignals:
    """Within its `with`, remembers the first SIGTERM or SIGINT; a second one acts as it always does.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._inherited: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in ASKING:
            self._inherited[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        # Not print: a signal may come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving and leaving after this step; once more to leave at once\n".encode())

    def check(self) -> None:
        """Raise PreemptionRequested if a signal has come; for use in what takes long between two steps."""
        if self.received is not None:
            raise PreemptionRequested

    def _restore(self) -> None:
        for number, handler in self._inherited.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
