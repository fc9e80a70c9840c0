"""Lines for people."""

import io
import logging

import pytest

from tests import commands
from umae_jax import console
from umae_jax.console import LogHandler, duration, size


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (187, "3:07"), (3729, "1:02:09")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(2**19, "0 MiB"), (300 * 2**20, "300 MiB"), (3.9 * 2**30, "3.9 GiB")])
def test_sizes(count, text):
    assert size(count) == text


def test_log_records_are_plain_lines(capsys):
    LogHandler().emit(logging.LogRecord("absl", logging.WARNING, "file.py", 1, "skipped %s", ("a.jpg",), None))
    assert capsys.readouterr().err == "warning: skipped a.jpg\n"


def test_what_a_stream_cannot_write_is_escaped(monkeypatch):
    for encoding, expected in (("utf-8", b"\xc3\xa4\\udcff\n"), ("ascii", b"\\xe4\\udcff\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", stream)
        console.result("\u00e4\udcff")
        assert stream.buffer.getvalue() == expected


def test_a_reader_that_ends_early_gets_no_traceback():
    with commands.start("models") as process:
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == ""
