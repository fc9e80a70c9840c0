"""Metrics and pictures of a run: files and TensorBoard in its directory, a tracker, lines or a bar on the terminal."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from umae_jax.config import to_json
from umae_jax.console import duration, say, warn
from umae_jax.errors import UserError
from umae_jax.files import AnyPath, first_line, in_bucket, write_atomic
from umae_jax.multihost import broadcast_json
from umae_jax.training.trackers import Tracker, open_tracker

METRICS_FILE = "metrics.jsonl"
FLUSH_SECONDS = 30  # interval of writing to TensorBoard and to a bucket


def _lines(path: AnyPath) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Yield step, values and bytes of each line; skip lines that a killed process left incomplete."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                values = json.loads(line)
                yield values["step"], values, line


def metric_names(workdir: AnyPath, step: int) -> set[str]:
    """Return the names of the metrics that a run has written for a step."""
    return {name for at, values, _ in _lines(workdir / METRICS_FILE) if at == step for name in values}


def read_metrics(workdir: AnyPath) -> Iterator[dict[str, Any]]:
    """Yield the lines that a run has written, oldest first."""
    for _, values, _ in _lines(workdir / METRICS_FILE):
        yield values


def metric_history(workdir: AnyPath, name: str | None, last_step: int) -> dict[int, float]:
    """Return a metric by step, up to `last_step`, as process 0 reads it; every process must call it."""
    lines = (line for line in read_metrics(workdir) if line["step"] <= last_step)
    return dict(broadcast_json([(line["step"], line[name]) for line in lines if name in line]))


class MetricsWriter:
    """Writes metrics to a JSON Lines file, without a buffer, and metrics, pictures and texts to TensorBoard.

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
        write_atomic(self._jsonl, b"".join(line for at, _, line in _lines(workdir / METRICS_FILE) if at <= step))
        start = SessionLog(status=SessionLog.START)
        with _add_path(self._board_folder):
            self._board = EventsWriter(str(self._board_folder / "events"))
            self._board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._file = self._jsonl.open("ab", buffering=0)  # no buffer that could fail in `close`
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Write the metrics of a step; NaN and infinity become strings, because JSON has neither.

        Raises:
            OSError: naming the file that cannot be written.
        """
        from tensorboardX.summary import scalar

        finite = {key: value if abs(value) < float("inf") else str(value) for key, value in values.items()}
        line = (json.dumps({"step": step, **finite}) + "\n").encode()
        with _add_path(self._jsonl):
            if self._file.write(line) != len(line):  # short write: the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write_board(step, *(scalar(key, value) for key, value in values.items()))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            try:
                self.flush()
            except UserError as error:  # a bucket may recover before the next checkpoint
                logging.warning("%s; trying again in %d s", error, FLUSH_SECONDS)

    def write_picture(self, step: int, name: str, png: bytes) -> None:
        """Write a picture to DIR/NAME/STEP.png and to TensorBoard.

        Raises:
            OSError, UserError: naming the file that cannot be written.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        folder = self._workdir / name
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{step:07}.png", png)
        with Image.open(io.BytesIO(png)) as picture:
            image = Summary.Image(
                width=picture.width, height=picture.height, colorspace=len(picture.getbands()), encoded_image_string=png
            )
        self._write_board(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Write a text to TensorBoard.

        Raises:
            OSError: naming the file that cannot be written.
        """
        from tensorboardX.summary import text

        self._write_board(step, text(name, markdown))

    def _write_board(self, step: int, *summaries: Any) -> None:  # noqa: ANN401 - messages of tensorboardX
        from tensorboardX.proto.event_pb2 import Event

        with _add_path(self._board_folder):
            for summary in summaries:
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))

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
    """Reports a run, only from process 0: metrics and pictures to files and the tracker, and lines or a bar.

    Args:
        config: of the run.
        workdir: the run's directory.
        first: number of steps done before this process started.
        total: number of steps of the whole run.
        steps_per_epoch: may be a fraction.

    Raises:
        OSError, UserError: if a file cannot be written, or the tracker cannot start.
    """

    def __init__(self, config: ConfigDict, workdir: AnyPath, first: int, total: int, steps_per_epoch: float) -> None:
        self._total, self._steps_per_epoch, self._start = total, steps_per_epoch, time.monotonic()
        self._writer: MetricsWriter | None = None
        self._tracker: Tracker | None = None
        self._finished = False
        if jax.process_index() == 0:
            self._tracker = open_tracker(config, workdir)
            self._writer = MetricsWriter(workdir, first or -1)
            self._writer.write_text(first, "config", "".join(f"    {line}\n" for line in to_json(config).splitlines()))
            if self._tracker is not None:
                say(f"tracking with {config.tracker}: {self._tracker.place}")
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
        """Report the metrics of a training step, and the time left at the present rate.

        The loss is that of this step's batch, not a mean over the steps since the last report.
        """
        if self._writer is None:
            return
        self._write(step, values)
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
            self._write(step, values)
            self._print(step, [f"{key} {_format(key, value)}" for key, value in values.items()])

    def show(self, step: int, name: str, png: bytes) -> None:
        """Write a picture to DIR/NAME/STEP.png, and show it in TensorBoard and the tracker."""
        if self._writer is not None:
            self._writer.write_picture(step, name, png)
            self._track(lambda tracker: tracker.show(step, name, png))

    def _write(self, step: int, values: dict[str, float | int]) -> None:
        assert self._writer is not None
        self._writer.write(step, values)
        self._track(lambda tracker: tracker.log(step, values))

    def _track(self, send: Callable[[Tracker], None]) -> None:
        """Send something to the tracker; after an error the run goes on without it."""
        if self._tracker is None:
            return
        try:
            send(self._tracker)
        except Exception as error:  # each tracker has its own types
            self._tracker = None
            warn(
                f"tracker: it failed ({first_line(error)}); the run goes on without it, all metrics are in "
                f"{METRICS_FILE}; once the run is stopped, the same command connects again"
            )

    def _print(self, step: int, parts: list[str]) -> None:
        say(f"step {step}/{self._total} | {' | '.join(parts)}")

    def flush(self) -> None:
        """Write out all buffers, so that the metrics survive the end of this process."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self) -> None:
        """Write out all buffers of a run that is complete."""
        self.flush()
        self._finished = True

    def close(self) -> None:
        """Close the files, the tracker and the bar."""
        self._bar.close()
        self._track(lambda tracker: tracker.close(finished=self._finished))
        if self._writer is not None:
            self._writer.close()
