"""Several processes as one: they train alike, stop together, and say what is wrong instead of hanging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import commands
from tests.images import write_folder
from umae_jax.errors import UserError
from umae_jax.processes import Place, difference, find_place

TINY = ("--config", "tests/tiny.py")
ALONE = ("--config.picture_every=6", "--config.total_steps=7")
GLOO = "[Gloo]"  # XLA's greeting on standard output, not ours


def start(workdir, *overrides, **options):
    return commands.start_together("pretrain", *TINY, "--workdir", workdir, *overrides, **options)


def said(errors):
    """What was said that is ours or a failure."""
    return [line for line in errors.splitlines() if GLOO not in line]


def wait_for(process, beginning):
    for line in process.stderr:
        if line.startswith(beginning):
            return
    raise AssertionError(f"it ended before it said {beginning!r}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    commands.pretrain(workdir, *ALONE)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same run by two processes of four, and what they printed."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, commands.end(start(workdir, *ALONE, "--config.mesh.fsdp=8"))


def test_two_processes_train_as_one(alone, together):
    workdir, ((output, errors), (_, others)) = together
    np.testing.assert_allclose(commands.losses(workdir), commands.losses(alone), rtol=1e-5)
    assert output.splitlines()[-1] == str(workdir / "reconstructions" / "0000007.png")
    assert "8 cpu device(s)" in errors
    assert said(others) == []
    assert sorted(path.name for path in workdir.iterdir()) == sorted(path.name for path in alone.iterdir())
    ours, theirs = (sorted(path.name for path in (where / "reconstructions").iterdir()) for where in (workdir, alone))
    assert ours == theirs


@pytest.mark.parametrize("devices", [2, 8])
def test_a_run_goes_on_with_other_processes_and_devices(alone, together, tmp_path, devices):
    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "7")
    _, errors = commands.pretrain(workdir, *ALONE, devices=devices)
    assert "continuing at step 5" in errors
    np.testing.assert_allclose(commands.losses(workdir), commands.losses(alone), rtol=1e-5)


def test_a_signal_to_one_process_has_all_save_and_leave(alone, tmp_path):
    endless = ("--config.total_steps=100000", "--config.checkpoint_every=100000")
    started = start(tmp_path, *endless)
    wait_for(started[0], "step 3/")
    started[1].send_signal(signal.SIGTERM)
    (_, errors), (_, others) = commands.end(started, [143, 143])
    assert "stopped by SIGTERM at step" in errors
    assert "Traceback" not in errors + others
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"at step {step};" in errors
    commands.end(start(tmp_path, f"--config.total_steps={step + 2}"))
    assert [number for number, _ in commands.losses(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_is_killed_the_others_leave_and_say_so(tmp_path, victim):
    started = start(tmp_path, "--config.total_steps=100000")
    wait_for(started[0], "step 3/")
    started[victim].kill()
    killed = time.monotonic()
    other = started[1 - victim]
    _, errors = other.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert other.returncode != 0
    started[victim].communicate()
    if "gloo::EnforceNotMet" in errors:  # XLA's connections between CPUs may end the process before it can speak
        return
    assert f"error: process {victim} of 2 is gone" in errors
    if victim:  # JAX adds its own words where process 0 is gone, which keeps its accounts
        assert other.returncode == 1
        assert "Traceback" not in errors


def test_a_process_that_hangs_is_held_to_be_gone_after_the_time_given(tmp_path):
    started = start(tmp_path, "--config.total_steps=100000", "--lost_after=2")
    wait_for(started[0], "step 3/")
    started[1].send_signal(signal.SIGSTOP)
    _, errors = started[0].communicate(timeout=60)
    assert started[0].returncode == 1
    assert "error: process 1 of 2 is gone, silent for 2 s" in errors
    started[1].kill()
    started[1].communicate()


MEET = """
import sys, time
import jax
from umae_jax import processes
jax.distributed.initialize = lambda *_, **__: None
place = processes.Place("localhost", int(sys.argv[1]), 3, int(sys.argv[2]))
processes.join(place, {}, wait=60, silence=float(sys.argv[3]), say=print)
print("met", flush=True)
sent = 0
for line in processes.joined()._lines.values():
    def count(send=line.send, **message):
        global sent
        sent += 1
        send(**message)
    line.send = count
time.sleep(float(sys.argv[4]))
print(sent, flush=True)
if sys.argv[5] == "leave":
    jax.distributed.shutdown = lambda: None
    processes.joined().leave()
    sys.exit()
if sys.argv[2] == "1":
    processes.joined().fail("the disk is full", 3)
time.sleep(60)
"""


def meet(silence=60, then=60, end="fail"):
    port = commands.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, *map(str, (port, index, silence, then, end))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(commands.ROOT)},
        )
        for index in range(3)
    ]
    for process in started:
        assert process.stdout.readline() == "met\n"
    return started


def test_of_three_the_others_leave_where_one_is_killed_and_process_0_says_so():
    started = meet()
    started[2].kill()
    killed = time.monotonic()
    (_, errors), (_, others) = [process.communicate(timeout=30) for process in started[:2]]
    assert time.monotonic() - killed < 3
    assert errors.startswith("error: process 2 of 3 is gone; ")
    assert others == ""
    assert [process.returncode for process in started[:2]] == [1, 1]
    started[2].communicate()


def test_what_one_of_three_came_upon_is_said_by_process_0_and_few_words_are_made():
    started = meet(silence=8, then=3)
    printed = [process.communicate(timeout=30) for process in started]
    assert [process.returncode for process in started] == [3, 3, 3]
    assert printed[0][1].endswith(": the disk is full\n")
    assert printed[0][1].startswith("error: process 1 on ")
    assert [errors for _, errors in printed[1:]] == ["", ""]
    assert all(int(output.split()[0]) <= 5 * 2 for output, _ in printed if output)  # a beat a second, to two at most


def test_processes_that_are_done_leave_without_a_word():
    for _ in range(3):
        started = meet(then=0.1, end="leave")
        printed = [process.communicate(timeout=30) for process in started]
        assert [process.returncode for process in started] == [0, 0, 0]
        assert [errors for _, errors in printed] == ["", "", ""]


def test_processes_that_were_suspended_together_do_not_take_each_other_for_gone():
    started = meet(silence=2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in started:
            process.send_signal(number)
        time.sleep(4)
    assert [process.poll() for process in started] == [None] * 3
    for process in started:
        process.kill()
        process.communicate()


DIFFERENT = {
    "configuration": (
        ((), ("--config.model.decoder_depth=2",)),
        "has model.decoder_depth 2 where process 0 has 1; start all processes with the same software and the",
    ),
    "directory": ((("--workdir={tmp}/first",), ("--workdir={tmp}/second",)), "does not see what process 0 writes into"),
    "number": (((), ("--processes=3",)), "came as one of 3, and process 0 waits for 1 to 1 of 2, one each"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_processes_that_are_not_about_to_do_the_same_are_told_by_process_0(tmp_path, kind):
    differing, message = DIFFERENT[kind]
    differing = [[argument.format(tmp=tmp_path) for argument in arguments] for arguments in differing]
    (_, errors), (_, others) = commands.end(start(tmp_path / "run", differing=differing), [2, 2])
    assert errors.startswith("error: process 1 on ")
    assert message in errors
    assert errors.count("\n") == 1
    assert others == ""


def test_an_error_of_all_is_said_once(tmp_path):
    (_, errors), (_, others) = commands.end(start(tmp_path, "--config.data.source=folder:/no/such"), [2, 2])
    assert [line.split(";")[0] for line in said(errors)] == ["error: there is no folder /no/such"]
    assert said(others) == []


def test_an_error_of_one_ends_all(tmp_path):
    """The images are in the home directory of process 0 alone."""
    write_folder(tmp_path / "images", 8)
    homes = [{"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "other")}]
    started = start(tmp_path / "run", "--config.data.source=folder:~/images", environments=homes)
    (_, errors), (_, others) = commands.end(started, [2, 2])
    assert said(errors)[-1].startswith("error: process 1 on ")
    assert "there is no folder ~/images" in said(errors)[-1]
    assert said(others) == []


def test_who_is_waited_for_is_said(tmp_path):
    port = commands.free_port()
    several = (f"--coordinator=localhost:{port}", "--processes=3", "--wait=2")
    with commands.start("pretrain", *TINY, "--workdir", tmp_path, *several, "--process=0") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"error: process(es) 1, 2 of 3 did not come to localhost:{port} within 2 s" in errors
    with commands.start("pretrain", *TINY, "--workdir", tmp_path, *several, "--process=2") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"error: process 0 cannot be reached at localhost:{port} (Connection refused); start it first" in errors


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


def test_slurm_tells_where_a_process_stands(monkeypatch):
    told = {"JOB_ID": "4096", "STEP_NODELIST": "node[003-004]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_place(None, None, None, 1) == Place("node003", 61440, 4, 2, [0])
    assert find_place(None, 1, None, 1) is None
    for name in told:
        monkeypatch.delenv(f"SLURM_{name}")
    assert find_place(None, None, None, 1) is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("localhost:1", None, 0), "belong together"),
        ((None, 2, None), "belong together"),
        (("localhost", 2, 0), "'localhost' is not HOST:PORT, such as"),
        (("localhost:many", 2, 0), "is not HOST:PORT"),
        (("localhost:65536", 2, 0), "is not HOST:PORT"),
        (("localhost:1", 2, 2), "--process: 2 does not lie in 0..1"),
    ],
)
def test_a_place_told_wrongly_is_one_clear_sentence(told, message):
    with pytest.raises(UserError, match=message):
        find_place(*told, 1)


def test_other_versions_are_named():
    ours, theirs = {"jax": "0.10.2", "grain": "0.2.16"}, {"jax": "0.10.1", "grain": "0.2.16"}
    assert difference(ours, ours, "process 1 on b") is None
    sentence = difference(ours, theirs, "process 1 on b")
    assert sentence.startswith("process 1 on b has jax 0.10.1 where process 0 has 0.10.2; start all processes with")
