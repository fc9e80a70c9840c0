"""End-to-end tests of `pretrain` and `visualize`: start, stop, resume, and user errors."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import umae_jax
from tests import commands, tiny
from tests.images import write_folder
from umae_jax.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run with pictures: its directory, stdout and stderr."""
    workdir = tmp_path_factory.mktemp("finished")
    output, errors = commands.pretrain(workdir, "--config.picture_every=6")
    return workdir, output, errors


def test_a_run_writes_metrics_pictures_checkpoints_and_its_configuration(finished):
    workdir, output, errors = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "learning_rate", "images_per_second", "data_wait", "skipped_images"} <= set(lines[0])
    assert all(0 <= line["data_wait"] <= 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    peak = 1e-2 * 16 / 256  # reached after a warm-up of 2 steps, then half a cosine over the other 10
    rates = [peak * (step / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / 10)) / 2) for step in range(12)]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)
    assert sorted(path.name for path in (workdir / "reconstructions").iterdir()) == [
        "0000000.png",
        "0000006.png",
        "0000012.png",
    ]
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5, 10, 12]
    assert json.loads((workdir / "config.json").read_text())["model"]["widths"] == [8, 16]
    assert list((workdir / "tensorboard").iterdir())
    assert Path(output.strip()) == workdir / "reconstructions" / "0000012.png"
    assert "step 12/12 | epoch 12.8 | loss" in errors
    assert "Traceback" not in errors
    for name in ("loss.png", "progress.png"):
        with Image.open(workdir / name) as picture:
            assert min(picture.size) > 200
    _, steps = errors.split("\nWhat to do next:\n")
    assert f"  python -m umae_jax.visualize --workdir {workdir} " in steps
    assert f'  encoder = umae_jax.load_encoder("{workdir / "encoder.safetensors"}")\n' in steps
    image = np.zeros((1, 32, 32, 3), np.uint8)
    encoders = [umae_jax.load_encoder(path) for path in (workdir, workdir / "encoder.safetensors")]
    for one, other in zip(*(encoder(image) for encoder in encoders), strict=True):
        np.testing.assert_array_equal(one, other)


def test_repeating_the_command_after_the_last_step_changes_nothing(finished):
    workdir, output, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    encoder = workdir / "encoder.safetensors"
    encoder.unlink()  # as if the disk had been full at the end
    again, _ = commands.pretrain(workdir, "--config.picture_every=6")
    assert again == output
    assert len(encoder.read_bytes()) == len(before.pop(encoder))  # the order of its metadata is by chance
    assert {path: path.read_bytes() for path in before} == before


def test_losses_do_not_depend_on_the_numbers_of_devices_and_worker_processes(finished, tmp_path):
    commands.pretrain(tmp_path, "--config.data.workers=2", devices=1)
    ours, theirs = commands.losses(tmp_path), commands.losses(finished[0])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_run_stopped_by_signals_and_killed_ends_with_the_same_losses(tmp_path):
    """The signals come before the first periodic checkpoint, so only they can have written one."""
    rng = random.Random(0)
    config = tiny.get_config()
    config.total_steps = 60
    umae_jax.pretrain(config, tmp_path / "never_stopped")
    workdir, longer = tmp_path / "run", "--config.total_steps=60"
    stops = (
        (signal.SIGTERM, os.kill, ["--config.checkpoint_every=1000"]),
        (signal.SIGINT, os.killpg, ["--config.checkpoint_every=1000", "--config.data.workers=1"]),  # to the worker too
        (signal.SIGKILL, os.kill, ["--config.checkpoint_every=4"]),
    )
    step = 0
    for number, send, options in stops:
        command = ("--config", "tests/tiny.py", "--workdir", workdir, longer, *options)
        last = step + rng.randint(5, 11)
        with commands.start("pretrain", *command) as process:
            continued = False
            for line in process.stderr:
                continued |= line.startswith("continuing at step")
                if line.startswith("step ") and (step := int(line.split()[1].split("/")[0])) >= last:
                    break
            time.sleep(rng.uniform(0, 0.05))
            send(process.pid, number)
            _, errors = process.communicate(timeout=60)
        assert continued == (number != signal.SIGTERM)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert f"stopped by {number.name} at step" in errors
            assert "the same command continues" in errors
    _, errors = commands.pretrain(workdir, longer)
    assert "continuing at step" in errors
    assert commands.losses(workdir) == commands.losses(tmp_path / "never_stopped")


def test_pictures_can_be_enabled_later_and_a_truncated_checkpoint_falls_back_to_the_one_before(
    finished, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "reconstructions")
    config = tiny.get_config()
    config.picture_every = 5
    umae_jax.pretrain(config, workdir)
    assert "has reached step 12 already" in capsys.readouterr().err
    assert not (workdir / "reconstructions").exists()
    for path in (workdir / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    printed, errors = commands.pretrain(workdir, "--config.picture_every=5")
    assert printed.strip().endswith("0000012.png")
    assert "checkpoint 12 cannot be read" in errors
    assert "continuing at step 10" in errors
    assert "Traceback" not in errors
    assert commands.losses(workdir) == commands.losses(finished[0])


def test_broken_images_are_skipped_counted_and_named(tmp_path, caplog):
    folder = write_folder(tmp_path / "images", 12)
    (folder / "003.jpg").write_bytes(b"not an image")
    config = tiny.get_config()
    config.data.source = f"folder:{folder}"
    umae_jax.pretrain(config, tmp_path / "run")
    errors = caplog.text
    assert errors.count("skipped an image that cannot be read: ") == 1
    assert "003.jpg (not an image that Pillow can read)" in errors
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_images"] >= 16  # once in each of 16 epochs, and when it is drawn as a substitute for itself


BAD_CONFIGURATIONS = [
    ("image_size", (40, 32), "height 40 is not a multiple of 16.*choose 32 or 48"),
    ("data.source", "web", "unknown source 'web'; write photos, folder:PATH or tfds:NAME"),
    ("data.source", "folder:/no/such", "there is no folder /no/such"),
    ("total_steps", 0, "the run has no steps"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_an_error_in_one_sentence(tmp_path, key, value, message):
    config = tiny.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as failed:
        umae_jax.pretrain(config, tmp_path)
    assert "\n" not in str(failed.value)


BAD_INPUT = {
    "key": (["--config.model.widht=8"], "unknown key.*widht"),
    "value": (["--config.batch_size=many"], "batch_size.*many"),
    "batch": (["--config.batch_size=12"], "12 does not divide among 8 devices; choose a multiple of 8"),
    "config": (["--config=configs/none.py"], "no file configs/none.py"),
    "flag": (["--wordkir=x"], "wordkir"),
    "unwritable": (["--workdir=/proc/nobody/writes/here"], "/proc/nobody"),
    "a file": (["--workdir=pyproject.toml"], "pyproject.toml"),
    "no workdir": (["--workdir="], "--workdir is missing"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_prints_one_sentence(tmp_path, kind):
    changes, message = BAD_INPUT[kind]
    arguments = ["--config", "tests/tiny.py", "--workdir", tmp_path / "run", *changes]
    with commands.start("pretrain", *arguments) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode in (1, 2), errors
    assert "Traceback" not in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert re.search(message, errors), errors


def test_an_empty_folder_prints_one_sentence(tmp_path):
    _, errors = commands.pretrain(tmp_path / "run", f"--config.data.source=folder:{tmp_path}", status=2)
    assert errors.startswith(f"error: there is no image in {tmp_path}")


def test_the_checkpoint_of_another_model_is_rejected(finished):
    changes = ("--config.model.window=4", "--config.model.decoder_depth=2", "--config.seed=3")
    before = (finished[0] / "config.json").read_bytes()
    _, errors = commands.pretrain(finished[0], *changes, status=2)
    assert "checkpoints of another model" in errors
    assert "model.window is 8, not 4" in errors
    assert "model.decoder_depth is 1, not 2" in errors
    assert "seed" not in errors
    assert (finished[0] / "config.json").read_bytes() == before


def test_checkpoints_without_config_json_are_rejected_and_kept(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "config.json").unlink()
    _, errors = commands.pretrain(workdir, "--config.model.widths=(16, 32)", status=2)
    assert "holds checkpoints but no config.json" in errors
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5, 10, 12]


def test_another_batch_size_is_rejected(finished):
    _, errors = commands.pretrain(finished[0], "--config.batch_size=8", status=2)
    assert "batch_size is 16 in" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"), [((), "--config is missing"), (("--config=tests/tiny.py",), "--workdir is missing")]
)
def test_a_missing_required_flag_is_named(arguments, message):
    _, errors = commands.run("pretrain", *arguments, status=2)
    assert message in errors
    assert errors.count("\n") == 1


def test_a_full_disk_prints_an_error_without_traceback(tmp_path):
    """Use a file size limit in place of a full disk."""
    arguments = ["-m", "umae_jax.pretrain", "--config", "tests/tiny.py", "--workdir", str(tmp_path)]
    program = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
os.execv(sys.executable, [sys.executable, *{arguments}])
"""
    environment = {**os.environ, "PYTHONPATH": str(commands.ROOT), "XDG_CACHE_HOME": str(tmp_path / "home")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=commands.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert "could not write a checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert "compilation cache" not in done.stderr  # its failed writes are not reported


def test_visualize_draws_files_and_folders(finished, tmp_path):
    folder = write_folder(tmp_path / "images", 3)
    for images, rows in ((folder, 2), (folder / "001.jpg", 1)):
        output = tmp_path / "out" / f"{rows}.png"
        arguments = ("--workdir", finished[0], "--images", images, "--output", output, "--count", 2)
        printed, _ = commands.run("visualize", *arguments)
        assert printed.strip() == str(output)
        with Image.open(output) as picture:
            assert picture.height > rows * 200


VISUALIZE_ERRORS = {
    "no run": ({"--workdir": "{tmp}"}, "holds no run"),
    "no images": ({"--images": "/no/such"}, "no file or folder /no/such"),
    "not an image": ({"--images": "pyproject.toml"}, "can be read"),
    "not a png": ({"--output": "picture.jpg"}, "end picture.jpg in .png"),
    "missing": ({"--output": None}, "--output is missing"),
    "statistics": ({"--statistics": "none"}, "statistics"),
}


@pytest.mark.parametrize("kind", VISUALIZE_ERRORS)
def test_visualize_rejects_bad_input(finished, tmp_path, kind):
    changes, message = VISUALIZE_ERRORS[kind]
    write_folder(tmp_path / "images", 1)
    options = {"--workdir": finished[0], "--images": tmp_path / "images", "--output": tmp_path / "out.png", **changes}
    arguments = [f"{key}={str(value).format(tmp=tmp_path)}" for key, value in options.items() if value is not None]
    _, errors = commands.run("visualize", *arguments, status=2)
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*.png"))
