import io
import json
import math

import pytest

from umae_jax.files import write_whole
from umae_jax.training.metrics import METRICS_FILE, MetricsWriter, Progress, duration

VALUES = {"loss": 0.5, "images_per_second": 100.0, "data_wait": 0.25, "skipped_images": 0, "skipped_updates": 0}


def test_one_object_a_line_and_none_after_the_step_to_continue_from(tmp_path):
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


def test_what_is_not_finite_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "gradient_norm": math.inf})
    writer.close()
    strict = {"parse_constant": lambda name: pytest.fail(name)}
    assert json.loads((tmp_path / METRICS_FILE).read_text(), **strict)["loss"] == "nan"


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(0, 10, stream)
    progress.advance(5)
    progress.report(5, VALUES)
    progress.report(6, {**VALUES, "skipped_images": 2, "skipped_updates": 1})
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 5/10 | loss 0.5000 | 100.0 images/s | waiting for data 25% | ")
    assert first.endswith(" left")
    assert "2 images skipped | 1 updates skipped" in second


def test_a_bar_on_a_terminal():
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
