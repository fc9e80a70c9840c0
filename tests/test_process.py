"""Signals to a command at any moment before it has something to save."""

import signal
import time

import pytest

from tests import commands

COLD = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # or the phase of compilation is too short to meet


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        (None, signal.SIGINT),  # while it imports
        ("This run:", signal.SIGTERM),  # then the loader starts
        ("compiling the training step; ", signal.SIGINT),
        ("the step needs ", signal.SIGTERM),  # then the first picture compiles
    ],
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path, phase, number):
    arguments = ("--config", "tests/tiny.py", "--workdir", tmp_path / "run", "--config.picture_every=6")
    with commands.start("pretrain", *arguments, environment=COLD) as process:
        if phase is None:
            time.sleep(0.5)
        else:
            assert any(line.startswith(phase) for line in process.stderr)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    lines = errors.strip().splitlines()
    assert lines[-1] == f"stopped by {number.name}; run the same command again to go on"
    assert "first step" not in errors
    assert "Traceback" not in errors
    assert not printed


def test_a_second_signal_ends_a_run_that_is_saving(tmp_path):
    arguments = ("--config", "tests/tiny.py", "--workdir", tmp_path / "run", "--config.total_steps=100000")
    with commands.start("pretrain", *arguments) as process:
        assert any(line.startswith("step 3/") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("stopped by SIGINT")
