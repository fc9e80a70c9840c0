"""Prepare the process of a command before its slow imports, which this module therefore avoids."""

import os
import signal
import threading
from types import FrameType
from typing import NoReturn


def prepare() -> None:
    """Exit at once on SIGINT and SIGTERM, with status 128 + signal and one sentence; silence the log of XLA's C++.

    Python calls its handlers in the main thread, between bytecodes: not while XLA compiles there, and an exception from
    a handler would unwind through XLA. A second thread reads the signal from a pipe and ends the process at once.
    """
    if signal.getsignal(signal.SIGINT) is _exit:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it warns of slow compilation; errors become exceptions too
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _watch(reader: int) -> None:
    while True:
        (number,) = os.read(reader, 1)
        if signal.getsignal(number) is _exit:  # not while a `StopSignal` handles it
            _exit(number)


def _exit(number: int, _frame: FrameType | None = None) -> NoReturn:
    # os.write, because the signal may interrupt a print.
    os.write(2, f"\nstopped by {signal.Signals(number).name}; run the same command again to go on\n".encode())
    os._exit(128 + number)  # without cleaning up: other threads may be inside XLA
