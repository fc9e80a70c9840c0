import io
import json
import math
import resource
import struct

import pytest
from tensorboardX.proto import event_pb2

from umae_jax.files import write_whole
from umae_jax.training.metrics import METRICS_FILE, MetricsWriter, Progress, duration

VALUES = {"loss": 0.5, "images_per_second": 100.0, "data_wait": 0.25, "skipped_images": 0, "skipped_updates": 0}


def test_writes_one_object_per_line_and_drops_lines_after_the_restored_step(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3})
    writer.close()
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')  # a kill in mid-line
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"loss": 9.0})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 3} for step in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_hides_events_after_the_restored_step(tmp_path):
    for first in (0, 3):
        writer = MetricsWriter(tmp_path, first)
        writer.write(first + 1, {"loss": 0.5})
        writer.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len({path.name for path in files}) == len(files)
    events = [event_pb2.Event.FromString(data) for path in files for data in records(path)]
    starts = [event.step for event in events if event.session_log.status == event_pb2.SessionLog.START]
    assert starts[-1] == 4
    assert [(value.tag, value.simple_value) for value in events[-1].summary.value] == [("loss", 0.5)]


def records(path):
    data, start = path.read_bytes(), 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield data[start + 12 : start + 12 + length]
        start += length + 16


def write_many(writer):
    for step in range(100):
        writer.write(step, {"loss": 0.5})


def test_a_full_disk_raises_in_the_call_that_meets_it(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left") as failed:
            write_many(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.filename == str(tmp_path / METRICS_FILE)
    writer.close()


def test_infinite_values_stay_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "gradient_norm": math.inf})
    writer.close()
    strict = {"parse_constant": lambda name: pytest.fail(name)}
    assert json.loads((tmp_path / METRICS_FILE).read_text(), **strict)["loss"] == "nan"


def test_prints_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = Progress(0, 10, stream)
    progress.advance(5)
    progress.report(5, VALUES)
    progress.report(6, {**VALUES, "skipped_images": 2, "skipped_updates": 1})
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 5/10 | loss 0.5000 | 100.0 images/s | waiting for data 25% | ")
    assert first.endswith(" remaining")
    assert "2 images skipped | 1 updates skipped" in second


def test_shows_a_bar_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(2, 10, stream)
    progress.advance(5)
    progress.report(5, VALUES)
    progress.close()
    assert "5/10" in stream.getvalue()
    assert "loss 0.5000, 100.0 images/s, waiting for data 25%" in stream.getvalue()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59, "59 s"), (187, "3:07"), (3729, "1:02:09")])
def test_durations(seconds, said):
    assert duration(seconds) == said
