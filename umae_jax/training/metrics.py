"""Metrics of a run: metrics.jsonl and TensorBoard in its directory, and lines or a bar on the terminal."""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

from umae_jax.console import duration, say
from umae_jax.errors import UserError
from umae_jax.files import AnyPath, in_bucket, write_atomic
from umae_jax.multihost import broadcast_json

METRICS_FILE = "metrics.jsonl"
FLUSH_SECONDS = 30  # interval of writing to TensorBoard and to a bucket


def _lines(path: AnyPath) -> Iterator[tuple[int, bytes]]:
    """Yield the step and the bytes of each line; skip lines that a killed process left incomplete."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                yield json.loads(line)["step"], line


def metric_names(workdir: AnyPath, step: int) -> set[str]:
    """Return the names of the metrics that a run has written for a step."""
    return {name for at, line in _lines(workdir / METRICS_FILE) if at == step for name in json.loads(line)}


def metric_history(workdir: AnyPath, name: str | None, last_step: int) -> dict[int, float]:
    """Return a metric by step, up to `last_step`, as process 0 reads it; every process must call it."""
    lines = ((step, json.loads(line)) for step, line in _lines(workdir / METRICS_FILE) if step <= last_step)
    return dict(broadcast_json([(at, values[name]) for at, values in lines if name in values]))


class MetricsWriter:
    """Writes metrics to a JSON Lines file, without a buffer, and to TensorBoard.

    All writing happens in the calling thread, so a full disk raises in the call that writes. A bucket cannot append to
    a file: its files are written to a local folder, and `flush` uploads them.

    Args:
        workdir: the run's directory.
        step: step from which the run continues; later lines are removed from the file, and TensorBoard hides them.
    """

    def __init__(self, workdir: AnyPath, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # slow: it imports torch if that is installed
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._workdir = workdir
        self._local = Path(tempfile.mkdtemp() if in_bucket(workdir) else workdir)
        self._jsonl, self._board_folder = self._local / METRICS_FILE, self._local / "tensorboard"
        self._board_folder.mkdir(exist_ok=True)
        write_atomic(self._jsonl, b"".join(line for at, line in _lines(workdir / METRICS_FILE) if at <= step))
        self._file = self._jsonl.open("ab", buffering=0)  # no buffer that could fail in `close`
        self._board = EventsWriter(str(self._board_folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Write the metrics of a step; NaN and infinity become strings, because JSON has neither.

        Raises:
            OSError: naming the file that cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        finite = {key: value if abs(value) < float("inf") else str(value) for key, value in values.items()}
        line = (json.dumps({"step": step, **finite}) + "\n").encode()
        with _add_path(self._jsonl):
            if self._file.write(line) != len(line):  # short write: the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _add_path(self._board_folder):
            for key, value in values.items():
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self.flush()
            except UserError as error:  # a bucket may recover before the next checkpoint
                logging.warning("%s; trying again in %d s", error, FLUSH_SECONDS)

    def flush(self) -> None:
        """Write out all buffers: metrics survive the end of this process, and TensorBoard shows them.

        Raises:
            OSError, UserError: naming the file that cannot be written.
        """
        self._flushed = time.monotonic()
        with _add_path(self._board_folder):
            self._board.flush()
        if in_bucket(self._workdir):
            for path in (self._jsonl, *self._board_folder.iterdir()):
                write_atomic(self._workdir / path.relative_to(self._local), path.read_bytes())

    def close(self) -> None:
        """Close the files and ignore errors, which an earlier `flush` has raised."""
        with contextlib.suppress(OSError, UserError):
            self.flush()
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()
        if in_bucket(self._workdir):
            shutil.rmtree(self._local, ignore_errors=True)


def _format(key: str, value: float) -> str:
    """Format a metric for people: accuracies, "..._top1" and "..._top5", as per cent with two decimals."""
    if key.endswith(("_top1", "_top5")):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@contextlib.contextmanager
def _add_path(path: Path) -> Iterator[None]:
    """Add the path to every OSError that is raised inside."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Report:
    """Reports a run, only from process 0: metrics to files, a line for each on the terminal, and a progress bar there.

    Args:
        workdir: the run's directory.
        first: number of steps done before this process started.
        total: number of steps of the whole run.
        steps_per_epoch: may be a fraction.
    """

    def __init__(self, workdir: AnyPath, first: int, total: int, steps_per_epoch: float) -> None:
        self._total, self._steps_per_epoch, self._start = total, steps_per_epoch, time.monotonic()
        self._writer = MetricsWriter(workdir, first) if jax.process_index() == 0 else None
        self._bar = tqdm(
            total=total,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=self._writer is None or not sys.stderr.isatty(),
        )

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        self._bar.update(step - self._bar.n)

    def training(self, step: int, values: dict[str, float | int], seconds_per_step: float) -> None:
        """Report the metrics of a training step, and the time left at the present rate."""
        if self._writer is None:
            return
        self._writer.write(step, values)
        parts = [f"epoch {step / self._steps_per_epoch:.4g}", f"loss {values['loss']:.4f}"]
        parts += [f"learning rate {values['learning_rate']:.3g}", f"{values['images_per_second']:.1f} images/s"]
        parts.append(f"waiting for data {values['data_wait']:.0%}")
        for name in ("images", "updates"):
            if skipped := values[f"skipped_{name}"]:
                parts.append(f"{skipped} {name} skipped")
        parts.append(f"{duration(time.monotonic() - self._start)} elapsed")
        parts.append(f"{duration(seconds_per_step * (self._total - step))} remaining")
        self._print(step, parts)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Report the metrics of an evaluation."""
        if self._writer is not None:
            self._writer.write(step, values)
            self._print(step, [f"{key} {_format(key, value)}" for key, value in values.items()])

    def _print(self, step: int, parts: list[str]) -> None:
        say(f"step {step}/{self._total} | {' | '.join(parts)}")

    def flush(self) -> None:
        """Write out all buffers, so that the metrics survive the end of this process."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the files and the bar."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
