"""Lines for people."""

import logging

import pytest

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
