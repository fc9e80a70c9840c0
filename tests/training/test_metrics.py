import functools
import io
import json
import math
import resource
import struct
import sys

import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from tests import tiny
from tests.images import encode
from umae_jax.training.metrics import METRICS_FILE, MetricsWriter, Report

VALUES = {"loss": 0.5, "learning_rate": 1e-3, "images_per_second": 100.0, "data_wait": 0.25}
VALUES |= {"skipped_images": 0, "skipped_updates": 0}


def test_lines_after_the_restored_step_are_dropped(tmp_path):
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


def test_pictures_and_the_configuration_are_in_tensorboard(tmp_path):
    report = Report(tiny.get_config(), tmp_path, 3, 10, steps_per_epoch=2.5)
    png = encode(Image.new("RGB", (6, 4)))
    report.show(4, "reconstructions", png)
    report.close()
    assert (tmp_path / "reconstructions" / "0000004.png").read_bytes() == png
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [event_pb2.Event.FromString(data) for data in records(file)]
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    step, value = values["reconstructions"]
    assert (step, value.image.width, value.image.height, value.image.encoded_image_string) == (4, 6, 4, png)
    step, value = values["config/text_summary"]
    assert step == 3
    assert '    "batch_size": 16,' in value.tensor.string_val[0].decode()


def test_a_full_disk_names_the_picture_that_cannot_be_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left") as failed:
            writer.write_picture(1, "reconstructions", encode(Image.new("RGB", (6, 4))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.filename == str(tmp_path / "reconstructions" / "0000001.png")
    writer.close()


def records(path):
    data, start = path.read_bytes(), 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield data[start + 12 : start + 12 + length]
        start += length + 16


def test_a_full_disk_raises_in_the_call_that_meets_it(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    write = functools.partial(writer.write, values={"loss": 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left") as failed:
            list(map(write, range(100)))
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


def test_prints_a_line_per_report(tmp_path, capsys):
    report = Report(tiny.get_config(), tmp_path, 0, 10, steps_per_epoch=2.5)
    report.training(5, VALUES, seconds_per_step=60)
    report.training(6, {**VALUES, "skipped_images": 2, "skipped_updates": 1}, seconds_per_step=2)
    report.evaluation(6, {"top1": 0.123456, "images": 1000})
    report.close()
    first, second, third = capsys.readouterr().err.splitlines()
    start = "step 5/10 | epoch 2 | loss 0.5000 | learning rate 0.001 | 100.0 images/s | waiting for data 25% | "
    assert first.startswith(start)
    assert first.endswith(" s elapsed | 5:00 remaining")
    assert "2 images skipped | 1 updates skipped" in second
    assert second.endswith("| 8 s remaining")
    assert third == "step 6/10 | top1 0.1235 | images 1,000"
    steps = [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert steps == [5, 6, 6]


def test_keeps_lines_above_the_bar_of_a_terminal(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    report = Report(tiny.get_config(), tmp_path, 2, 10, steps_per_epoch=2.5)
    report.advance(5)
    report.training(5, VALUES, seconds_per_step=1)
    report.close()
    assert "5/10 [" in stream.getvalue()
    assert "\rstep 5/10 | epoch 2 | " in stream.getvalue() or "\x1b[Kstep 5/10" in stream.getvalue()
    assert stream.getvalue().count("loss 0.5000") == 1


def test_a_run_without_a_checkpoint_starts_with_an_empty_file(tmp_path):
    """Its directory may hold the validation of an earlier start, with other weights, before the first step."""
    earlier = MetricsWriter(tmp_path, -1)
    earlier.write(0, {"validation_top1": 0.9})
    earlier.close()
    report = Report(tiny.get_config(), tmp_path, 0, 10, steps_per_epoch=2.5)
    report.close()
    assert (tmp_path / METRICS_FILE).read_bytes() == b""
