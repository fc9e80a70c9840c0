"""What a run reports: metrics.jsonl and TensorBoard in the working directory, and a line or a bar on the terminal."""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TextIO

import jax
from absl import logging
from etils import epath
from tqdm import tqdm

from umae_jax.errors import UserError
from umae_jax.files import AnyPath, GrowingObject, write_whole

# tensorboardX imports torch where that is installed, for what is not used here; it would be half of all imports.
_modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
_modules.setdefault("torch", None)  # which Python takes for a module that is not there
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto import event_pb2  # noqa: E402
from tensorboardX.record_writer import register_writer_factory  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

if _modules["torch"] is None:
    del _modules["torch"]

METRICS_FILE = "metrics.jsonl"
FLUSH_SECONDS = 30  # how late TensorBoard may see a line


def _keep_up_to(path: AnyPath, step: int) -> bytes:
    """Drop the lines that a run wrote after the checkpoint it now continues from, and one that a kill cut short."""
    if not path.exists():
        return b""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, b"".join(kept))
    return b"".join(kept)


def duration(seconds: float) -> str:
    """Seconds as people read them: "42 s", "3:07", "1:02:09"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def metrics_of(workdir: AnyPath, step: int) -> set[str]:
    """The metrics that a run has written of a step."""
    path = workdir / METRICS_FILE
    there: set[str] = set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # one that a kill cut short
            values = json.loads(line)
            there |= set(values) if values["step"] == step else set()
    return there


class _Buckets:
    """How tensorboardX opens what lies in a bucket."""

    def open(self, path: str) -> GrowingObject:
        return GrowingObject(epath.Path(path))

    def directory_check(self, path: str) -> None:
        """There are no directories."""


register_writer_factory("gs", _Buckets())


class MetricsWriter:
    """Writes one JSON object a line, each at once, and the same to TensorBoard; into a bucket both by `flush` alone.

    Everything is written by the calling thread, so that a disk that is full is told by the call that finds it so.

    Args:
        workdir: the run's directory.
        step: the step from which the run goes on; lines of later steps are dropped, as they will be written again.
    """

    def __init__(self, workdir: AnyPath, step: int) -> None:
        self._path = workdir / METRICS_FILE
        kept = _keep_up_to(self._path, step)
        # Unbuffered: nothing is left to fail when it is closed.
        self._file = (
            self._path.open("ab", buffering=0) if isinstance(self._path, Path) else GrowingObject(self._path, kept)
        )
        self._board_path = workdir / "tensorboard"
        self._board_path.mkdir(exist_ok=True)
        self._board = EventsWriter(str(self._board_path / "events"))
        self._flushed = time.monotonic()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # has TensorBoard drop what comes after `step`
        self._board.write_event(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """One line. A number that is not finite is written as a string, which JSON can hold.

        Raises:
            OSError: naming the file that cannot be written.
        """
        line = {
            key: value if isinstance(value, int) or abs(value) < float("inf") else str(value)
            for key, value in values.items()
        }
        data = (json.dumps({"step": step, **line}) + "\n").encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written != len(data):  # the disk took a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        try:
            for key, value in values.items():
                event = event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(key, value))
                self._board.write_event(event)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._board_path)) from error
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self.flush()
            except UserError as error:  # of a bucket; there is time until the next checkpoint
                logging.warning("%s; trying again in %d s", error, FLUSH_SECONDS)

    def flush(self) -> None:
        """Have what was written so far survive this process, and TensorBoard see it.

        Raises:
            OSError, UserError: naming what cannot be written.
        """
        self._flushed = time.monotonic()
        self._file.flush()
        try:
            self._board.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._board_path)) from error

    def close(self) -> None:
        """Let go of everything; what could not be written has been told by `flush`, or does not tell why a run ends."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError, UserError):
                file.close()


class Progress:
    """How far a run is: a bar on a terminal, plain lines elsewhere. Writes to standard error.

    Args:
        first, total: steps done before, and in all.
    """

    def __init__(self, first: int, total: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._first, self._total = first, total
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=first,
            file=self._stream,
            unit="step",
            dynamic_ncols=True,
            disable=not self._stream.isatty(),
        )

    def advance(self, step: int) -> None:
        """The run has done `step` steps."""
        self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, float | int]) -> None:
        """Say the metrics of a step."""
        parts = [f"loss {values['loss']:.4f}", f"{values['images_per_second']:.1f} images/s"]
        parts.append(f"waiting for data {values['data_wait']:.0%}")
        if values["skipped_images"]:
            parts.append(f"{values['skipped_images']} images skipped")
        if values["skipped_updates"]:
            parts.append(f"{values['skipped_updates']} updates skipped")
        if self._bar.disable:
            left = (time.monotonic() - self._start) / max(1, step - self._first) * (self._total - step)
            line = f"step {step}/{self._total} | {' | '.join(parts)} | {duration(left)} left"
            print(line, file=self._stream, flush=True)
        else:
            self._bar.set_postfix_str(", ".join(parts))

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Say what was measured between steps."""
        parts = (
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}" for key, value in values.items()
        )
        self._bar.clear()
        print(f"step {step}/{self._total} | {' | '.join(parts)}", file=self._stream, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the terminal tidy."""
        self._bar.close()


class Report:
    """What a run tells, once for all processes: its files and the terminal.

    Args:
        workdir: the run's directory.
        first, total: steps done before, and in all.
    """

    def __init__(self, workdir: AnyPath, first: int, total: int) -> None:
        self._speaks = jax.process_index() == 0
        if self._speaks:
            self._writer = MetricsWriter(workdir, first)
            self._progress = Progress(first, total)

    def advance(self, step: int) -> None:
        """The run has done `step` steps."""
        if self._speaks:
            self._progress.advance(step)

    def training(self, step: int, values: dict[str, float | int]) -> None:
        """The metrics of a step."""
        if self._speaks:
            self._writer.write(step, values)
            self._progress.report(step, values)

    def measured(self, step: int, values: dict[str, float]) -> None:
        """What was measured between steps."""
        if self._speaks:
            self._writer.write(step, values)
            self._progress.tell(step, values)

    def flush(self) -> None:
        """Have what was told so far survive this process."""
        if self._speaks:
            self._writer.flush()

    def close(self) -> None:
        """Let go of the files and the terminal."""
        if self._speaks:
            self._progress.close()
            self._writer.close()
