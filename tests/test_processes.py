"""Several processes fine-tune as one, stop together, and end when one of them fails.

tests/test_files.py pre-trains with two processes.
"""

import json
import signal
import time

import numpy as np

import umae_jax
from tests import commands, tiny_classifier
from tests.images import write_folder

TINY = ("--config", "tests/tiny.py", "--config.model.depths=(1,1)")  # each process compiles anew
ENDLESS = ("--config.total_steps=100000", "--config.checkpoint_every=100000")


def start(workdir, *overrides, **options):
    return commands.start_together("pretrain", *TINY, "--workdir", workdir, *overrides, **options)


def wait_for(process, prefix):
    for line in process.stderr:
        if line.startswith(prefix):
            return
    raise AssertionError(f"it ended without a line that starts with {prefix!r}")


def overrides(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


def test_a_signal_to_one_process_makes_all_save_and_leave(tmp_path):
    """Also in a run that continues, and before its first step: JAX agrees on a count, not on a step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        started = start(tmp_path, *ENDLESS, "--config.mesh.fsdp=8")
        wait_for(started[0], "step " if number == signal.SIGTERM else "continuing at")
        started[1].send_signal(number)
        (_, errors), (_, others) = commands.end(started, [143, 143])
        assert "Traceback" not in errors + others
        step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
        assert f"stopped by SIGTERM at step {step};" in errors
    assert [number for number, _ in commands.losses(tmp_path)] == list(range(1, step + 1))


def test_when_one_process_is_killed_the_other_leaves_after_the_timeout(tmp_path):
    first, second = start(tmp_path, *ENDLESS, "--heartbeat_timeout=10")
    wait_for(first, "step 3/")
    second.kill()
    begin = time.monotonic()
    _, errors = first.communicate(timeout=90)
    assert time.monotonic() - begin < 60  # on a busy machine
    second.communicate()
    assert first.returncode not in (0, 2, 143)
    assert errors


def test_processes_with_different_settings_do_not_train(tmp_path):
    """An error of all processes is one sentence from each."""
    printed = commands.end(start(tmp_path, differing=[(), ("--config.model.decoder_depth=2",)]), [2, 2])
    for _, errors in printed:
        (line,) = commands.lines_of(errors)
        assert line.startswith("error: process 1 on ")
        assert "model.decoder_depth 2 where process 0 has 1" in line


def test_an_error_of_one_process_ends_all(tmp_path):
    """The images are in the home directory of process 0 only."""
    write_folder(tmp_path / "images", 8)
    homes = [{"HOME": str(tmp_path)}, {"HOME": str(tmp_path / "other")}]
    first, second = start(tmp_path / "run", "--config.data.source=folder:~/images", environments=homes)
    _, errors = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert 0 not in (first.returncode, second.returncode)
    assert commands.lines_of(errors)[0].startswith("error: there is no folder ~/images")


def test_fine_tuning_reports_and_evaluates_as_one_process_does(tmp_path):
    folder = write_folder(tmp_path / "images", 20, classes=("a", "b"))
    options = {"data.source": f"folder:{folder}", "validation.source": f"folder:{folder}"}
    options |= {"model.depths": (1, 1), "total_steps": 6, "validation.every_epochs": 2.0}
    config = tiny_classifier.get_config()
    config.update_from_flattened_dict(options)
    umae_jax.finetune(config, tmp_path / "alone")
    arguments = ("finetune", "--config", "tests/tiny_classifier.py", *overrides(options))
    (output, _), _ = commands.end(commands.start_together(*arguments, "--workdir", tmp_path / "together"))
    assert "best top-1" in output
    together, alone = (commands.lines(tmp_path / name) for name in ("together", "alone"))
    assert [sorted(line) for line in together] == [sorted(line) for line in alone]
    for line, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(list(line.values()), [expected[key] for key in line], rtol=1e-5)
    arguments = ("evaluate", "--json", "--batch_size=8", "--workdir", tmp_path / "alone")
    (output, _), _ = commands.end(commands.start_together(*arguments))
    assert json.loads(output.splitlines()[-1]) == umae_jax.evaluate(tmp_path / "alone", batch_size=8)
