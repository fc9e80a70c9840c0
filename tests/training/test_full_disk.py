"""Whichever writer meets a full disk first, its sentence is the one that the user reads."""

import errno
import os

import orbax.checkpoint as ocp
import pytest
from tensorboardX import record_writer
from tensorboardX.event_file_writer import EventsWriter

from tests import toy
from tests.training.test_run import toy_task
from umae_jax import files
from umae_jax.config import METHODS
from umae_jax.files import explain, write_atomic
from umae_jax.multihost import StopSignal
from umae_jax.training.checkpoint import Checkpoints
from umae_jax.training.metrics import MetricsWriter
from umae_jax.training.run import train


class Task(toy.Task):
    """Has classes, and draws a picture in its hook."""

    def __init__(self, config):
        super().__init__(config)
        self.class_names = ("cat", "dog")

    def hooks(self, context):
        def draw(step, params):
            write_atomic(context.workdir / f"{step}.png", b"picture")
            return self.measure(context.graph, params, context.mesh, 16)

        return [hook._replace(run=draw, every=2) for hook in super().hooks(context)]


def full(path=None):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


class FullFile:
    def write(self, line):
        return 0

    def close(self):
        full()


def fill_atomic(monkeypatch, name):
    """Let writes of one file fail."""
    write = files.write_together
    monkeypatch.setattr(files, "write_together", lambda f: full(str(next(iter(f)))) if name in str([*f]) else write(f))


def fill_metrics(monkeypatch):
    start = MetricsWriter.__init__

    def init(self, *args):
        start(self, *args)
        self._file.close()
        self._file = FullFile()

    monkeypatch.setattr(MetricsWriter, "__init__", init)


WRITERS = {
    "config.json": lambda patch: fill_atomic(patch, "config.json"),
    "classes.json": lambda patch: fill_atomic(patch, "classes.json"),
    "2.png": lambda patch: fill_atomic(patch, "2.png"),
    "metrics.jsonl": fill_metrics,
    "tensorboard": lambda patch: patch.setattr(EventsWriter, "flush", lambda *_: full()),
    "tensorboard (its start)": lambda patch: patch.setattr(record_writer, "open_file", lambda _: full()),
    "checkpoints": lambda patch: patch.setattr(ocp.CheckpointManager, "wait_until_finished", lambda *_: full()),
}


@pytest.fixture
def _method(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", toy.METHOD)


def fill_close(monkeypatch):
    """Let everything that closes fail too, as on a disk that is really full."""
    close = ocp.CheckpointManager.close

    def close_checkpoints(self):
        close(self)
        full()

    def close_board(self):
        self._py_recordio_writer.close()
        full()

    monkeypatch.setattr(ocp.CheckpointManager, "close", close_checkpoints)
    monkeypatch.setattr(EventsWriter, "close", close_board)


@pytest.mark.usefixtures("_method")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence_that_names_the_file(writer, tmp_path, monkeypatch):
    fill_close(monkeypatch)
    WRITERS[writer](monkeypatch)
    with StopSignal() as stop, pytest.raises((OSError, ValueError)) as raised:
        train(Task(toy_task(total_steps=4).config), tmp_path, stop)
    sentence = explain(raised.value)
    assert str(tmp_path / writer.partition(" ")[0]) in sentence
    assert "No space left on device" in sentence
    assert "\n" not in sentence


def test_the_metrics_of_the_best_checkpoint_meet_a_full_disk(tmp_path, monkeypatch):
    from tests.training.test_checkpoint import abstract_on, make_mesh, make_state

    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    checkpoints.save(2, make_state(1.0), {"samples": 0})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, best_metric="top1")
    state, data = checkpoints.restore(abstract_on(make_mesh(), make_state(0.0)))
    fill_atomic(monkeypatch, "metadata")
    with pytest.raises(ValueError, match=r"checkpoint in .*No space left on device.*--workdir"):
        checkpoints.save(2, state, data, {"top1": 1.0})
    checkpoints.close()
