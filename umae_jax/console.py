"""Lines for people on the terminal, above the progress bar if there is one."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

GIB = 2**30


def _is_primary() -> bool:
    """Return whether this is process 0; a process that has not imported JAX is the only one."""
    if "jax" not in sys.modules:
        return True
    from umae_jax import multihost  # imports JAX

    return multihost.is_primary()


def say(line: str) -> None:
    """Print a line on standard error, from process 0 only."""
    if _is_primary():
        tqdm.write(_encodable(line, sys.stderr), file=sys.stderr)


def warn(line: str) -> None:
    """Print a warning of one line on standard error, from process 0 only."""
    say(f"warning: {line}")


def result(line: object) -> None:
    """Print the result of the command on standard output, from process 0 only."""
    if not _is_primary():
        return
    try:
        print(_encodable(str(line), sys.stdout), flush=True)  # noqa: T201 - the terminal
    except BrokenPipeError:  # its reader has ended, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would fail to flush again
        sys.exit(1)


def _encodable(text: str, stream: TextIO) -> str:
    """Escape what a stream cannot write: bytes of names that are not UTF-8, and letters that its encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def duration(seconds: float) -> str:
    """Format seconds: "42 s", "3:07", "1:02:09"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Format a number of bytes: "312 MiB", "3.9 GiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


class LogHandler(logging.Handler):
    """Prints log records of every process as plain lines, without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        tqdm.write(_encodable(line, sys.stderr), file=sys.stderr)
