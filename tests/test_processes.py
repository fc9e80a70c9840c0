"""Several processes train as one, stop together, and end when one of them fails."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from tests import commands
from tests.images import write_folder

TINY = ("--config", "tests/tiny.py")
ALONE = ("--config.picture_every=6", "--config.total_steps=7")
ENDLESS = ("--config.total_steps=100000", "--config.checkpoint_every=100000")
GLOO = "[Gloo]"  # printed by XLA when processes connect


def start(workdir, *overrides, **options):
    return commands.start_together("pretrain", *TINY, "--workdir", workdir, *overrides, **options)


def lines(errors):
    """Lines of the terminal that XLA does not print on every start."""
    return [line for line in errors.splitlines() if GLOO not in line]


def wait_for(process, prefix):
    for line in process.stderr:
        if line.startswith(prefix):
            return
    raise AssertionError(f"it ended without a line that starts with {prefix!r}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    commands.pretrain(workdir, *ALONE)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same run by two processes of four devices, and what they printed."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, commands.end(start(workdir, *ALONE, "--config.mesh.fsdp=8"))


def test_two_processes_train_as_one(alone, together):
    workdir, ((output, errors), (_, others)) = together
    np.testing.assert_allclose(commands.losses(workdir), commands.losses(alone), rtol=1e-5)
    assert output.splitlines()[-1] == str(workdir / "reconstructions" / "0000007.png")
    assert "8 cpu device(s)" in errors
    assert lines(others) == []
    assert sorted(path.name for path in workdir.iterdir()) == sorted(path.name for path in alone.iterdir())
    ours, theirs = (sorted(path.name for path in (where / "reconstructions").iterdir()) for where in (workdir, alone))
    assert ours == theirs


@pytest.mark.parametrize("devices", [2, 8])
def test_a_run_continues_with_other_processes_and_devices(alone, together, tmp_path, devices):
    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "7")
    _, errors = commands.pretrain(workdir, *ALONE, devices=devices)
    assert "continuing at step 5" in errors
    np.testing.assert_allclose(commands.losses(workdir), commands.losses(alone), rtol=1e-5)


def test_a_signal_to_one_process_makes_all_save_and_leave(tmp_path):
    """Also in a run that continues, and before its first step: JAX agrees on a count, not on a step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        started = start(tmp_path, *ENDLESS)
        wait_for(started[0], "step " if number == signal.SIGTERM else "continuing at")
        started[1].send_signal(number)
        (_, errors), (_, others) = commands.end(started, [143, 143])
        assert "Traceback" not in errors + others
        step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
        assert f"stopped by SIGTERM at step {step};" in errors
    assert [number for number, _ in commands.losses(tmp_path)] == list(range(1, step + 1))


@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_when_one_process_is_gone_the_other_leaves_after_the_timeout(tmp_path, number, victim):
    started = start(tmp_path, *ENDLESS, "--heartbeat_timeout=10")
    wait_for(started[0], "step 3/")
    started[victim].send_signal(number)
    begin = time.monotonic()
    _, errors = started[1 - victim].communicate(timeout=90)
    assert time.monotonic() - begin < 60  # of a busy machine
    started[victim].kill()
    started[victim].communicate()
    assert started[1 - victim].returncode not in (0, 2, 143)
    assert errors


def test_processes_with_different_settings_do_not_train(tmp_path):
    printed = commands.end(start(tmp_path, differing=[(), ("--config.model.decoder_depth=2",)]), [2, 2])
    for _, errors in printed:
        (line,) = lines(errors)
        assert line.startswith("error: process 1 on ")
        assert "model.decoder_depth 2 where process 0 has 1" in line


def test_an_error_of_all_processes_is_one_sentence_from_each(tmp_path):
    printed = commands.end(start(tmp_path, "--config.data.source=folder:/no/such"), [2, 2])
    for _, errors in printed:
        (line,) = lines(errors)
        assert line.startswith("error: there is no folder /no/such")


def test_an_error_of_one_process_ends_all(tmp_path):
    """The images are in the home directory of process 0 only."""
    write_folder(tmp_path / "images", 8)
    homes = [{"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "other")}]
    first, second = start(tmp_path / "run", "--config.data.source=folder:~/images", environments=homes)
    _, errors = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert 0 not in (first.returncode, second.returncode)
    assert lines(errors)[0].startswith("error: there is no folder ~/images")


def test_missing_processes_are_listed(tmp_path):
    port = commands.free_port()
    several = (f"--coordinator_address=localhost:{port}", "--num_processes=3", "--initialization_timeout=11")
    started = [
        commands.start("pretrain", *TINY, "--workdir", tmp_path, *several, f"--process_id={index}") for index in (0, 1)
    ]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode not in (0, 143)
        assert errors.startswith("still waiting for other processes, up to 11 s")
        assert "timed out task names:\n2\n" in errors


def test_fine_tuning_measures_and_keeps_what_one_process_does(tmp_path):
    folder = write_folder(tmp_path / "images", 20, classes=("a", "b"))
    options = [f"--config.data.source=folder:{folder}", f"--config.validation.source=folder:{folder}"]
    options += ["--config.total_steps=6", "--config.validation.every_epochs=2"]
    arguments = ("finetune", "--config", "tests/tiny_classifier.py", *options, "--workdir")
    commands.run(*arguments, tmp_path / "alone")
    (output, _), _ = commands.end(commands.start_together(*arguments, tmp_path / "together"))
    assert "best top-1" in output
    ours, theirs = (commands.lines(tmp_path / name) for name in ("together", "alone"))
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(line.values()), [other[key] for key in line], rtol=1e-5)
    measured = ("evaluate", "--json", "--batch_size=8", "--workdir", tmp_path / "alone")
    (output, _), _ = commands.end(commands.start_together(*measured))
    alone, _ = commands.run(*measured)
    assert json.loads(output.splitlines()[-1]) == json.loads(alone)
