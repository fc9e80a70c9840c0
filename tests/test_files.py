import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tests import commands
from tests.images import write_folder
from umae_jax import load_encoder
from umae_jax.data.sources import open_folder
from umae_jax.errors import UserError
from umae_jax.files import absolute, explain, locate, locate_local, move_folder, write_atomic, write_together
from umae_jax.training import metrics

COMMON = ("--config.checkpoint_every=4", "--config.checkpoint_keep=2", "--config.picture_every=6")


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket on a GCS emulator, for this process and its subprocesses."""
    port = commands.free_port()
    address = f"http://localhost:{port}"
    settings = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,  # Orbax's arrays
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # ArrayRecord
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("bucket_server.py"), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for _ in range(100):
            try:
                socket.create_connection(("localhost", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail("the emulator does not answer")
        yield "gs://bucket"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def images(bucket, tmp_path_factory):
    """The same images on disk and in the bucket."""
    folder = write_folder(tmp_path_factory.mktemp("images"), 16, ("ants", "bees"), height=40, width=40)
    copy = locate(f"{bucket}/images", "path")
    for path in folder.rglob("*.jpg"):
        (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    return folder, str(copy)


def test_a_path_is_local_or_in_a_bucket(bucket):
    assert locate("~/x", "path") == Path.home() / "x"
    assert str(locate(f"{bucket}/x", "--workdir") / "y") == f"{bucket}/x/y"
    with pytest.raises(UserError, match="--output: gs://bucket/x is in a bucket"):
        locate_local(f"{bucket}/x", "--output")


def test_an_unreachable_bucket_raises_a_one_sentence_error(bucket, monkeypatch):
    def fail(path):
        raise ValueError("no credentials\nmore")

    monkeypatch.setattr(type(epath.Path(bucket)), "exists", fail)
    with pytest.raises(UserError, match=r"--workdir: gs://bucket/x: ValueError: no credentials"):
        locate(f"{bucket}/x", "--workdir")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'init: gs:// needs .* pip install "umae_jax\[gcs\]"'):
        locate(f"{bucket}/x", "init")


def test_an_error_response_of_gcs_is_explained_in_one_sentence(bucket, monkeypatch):
    import gcsfs

    path = locate(f"{bucket}/x", "--workdir")

    async def fail(*arguments, **options):
        raise OSError("Forbidden: x\nand more")

    monkeypatch.setattr(gcsfs.core, "retry_request", fail)
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", fail)
    with pytest.raises(OSError, match="Forbidden") as failed:
        path.read_bytes()
    assert "(OSError: Forbidden: x)" in explain(failed.value)
    assert explain(OSError("another")) is None


def test_other_schemes_are_rejected():
    with pytest.raises(UserError, match="--workdir: s3://x/y is neither"):
        locate("s3://x/y", "--workdir")


def test_buckets_do_not_import_tensorflow(bucket, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('imported')")
    program = "from umae_jax.files import locate; print(locate('gs://bucket/x', 'x').exists())"
    environment = {**os.environ, "PYTHONPATH": f"{commands.ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "False\n", done.stderr


def test_metrics_survive_a_bucket_that_fails_for_a_while(bucket, monkeypatch):
    workdir = locate(f"{bucket}/failing", "--workdir")
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0)
    writer = metrics.MetricsWriter(workdir, 0)

    def fail(path, data):
        raise UserError("no network")

    monkeypatch.setattr(metrics, "write_atomic", fail)
    writer.write(1, {"loss": 1.0})  # warns, and tries again later
    with pytest.raises(UserError, match="no network"):
        writer.flush()  # before a checkpoint it must succeed
    writer.close()
    monkeypatch.undo()
    writer = metrics.MetricsWriter(workdir, 0)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    assert json.loads((workdir / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    writer.close()


def test_a_failed_write_to_a_bucket_raises_a_one_sentence_error(bucket):
    with pytest.raises(UserError, match="gs://none/x could not be written"):
        write_atomic(locate("gs://none/x", "path"), b"data")


def test_a_folder_moves_in_a_bucket_and_on_disk(bucket, tmp_path):
    for root in (locate(f"{bucket}/moved", "path"), epath.Path(tmp_path)):
        (root / "to" / "1").mkdir(parents=True, exist_ok=True)
        (root / "to" / "1" / "replaced").write_text("x")
        (root / "from" / "1" / "deep").mkdir(parents=True, exist_ok=True)
        (root / "from" / "1" / "deep" / "file").write_text("content")
        move_folder(root / "from" / "1", root / "to" / "1")
        assert [path.name for path in (root / "to" / "1").iterdir()] == ["deep"]
        assert (root / "to" / "1" / "deep" / "file").read_text() == "content"
        assert not (root / "from" / "1" / "deep" / "file").exists()


def test_absolute_paths(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(Path("x")) == tmp_path / "x"
    assert str(absolute(epath.Path(f"{bucket}/x"))) == f"{bucket}/x"


def test_writes_are_atomic(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_if_one_file_of_a_group_cannot_be_written_none_is(tmp_path):
    with pytest.raises(OSError, match="No such file") as failed:
        write_together({tmp_path / "a": b"1", tmp_path / "no" / "b": b"2"})
    assert failed.value.filename == str(tmp_path / "no" / "b")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_a_bucket_is_read_as_one_on_disk(images):
    local, remote = map(open_folder, map(str, images))
    assert local.classes == remote.classes == ("ants", "bees")
    assert len(local) == len(remote) == 16
    for number in range(16):
        assert remote[number]._replace(name="") == local[number]._replace(name="")
        assert remote[number].name == local[number].name.replace(*map(str, images))
    with pytest.raises(UserError, match="there is no folder gs://bucket/nothing"):
        open_folder("gs://bucket/nothing")


@pytest.fixture(scope="module")
def on_disk(images, tmp_path_factory):
    """A run on disk."""
    workdir = tmp_path_factory.mktemp("run")
    commands.pretrain(workdir, f"--config.data.source=folder:{images[0]}", *COMMON)
    return workdir


def losses_in(workdir):
    written = (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, written)]


def test_two_processes_train_as_one_in_a_bucket_and_one_process_continues_their_run(
    images, on_disk, tmp_path, monkeypatch
):
    workdir = epath.Path("gs://bucket/together")
    arguments = ("--config", "tests/tiny.py", "--workdir", workdir, f"--config.data.source=folder:{images[1]}", *COMMON)
    with monkeypatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        started = commands.start_together("pretrain", *arguments, "--config.mesh.fsdp=8")
    ((output, errors), (_, others)) = commands.end(started)
    assert not list(tmp_path.rglob("*-cache"))  # programs of several processes on CPUs have a new key each time
    np.testing.assert_allclose(losses_in(workdir), commands.losses(on_disk), rtol=1e-5)
    assert output.splitlines()[-1] == str(workdir / "reconstructions" / "0000012.png")
    assert "8 cpu of 2 processes" in errors
    assert [line for line in commands.lines_of(others) if "_TOKEN_FOR_TESTING" not in line] == []
    for folder in ("", "checkpoints", "reconstructions"):
        written, expected = (
            {path.name for path in (where / folder).iterdir()} for where in (workdir, epath.Path(on_disk))
        )
        assert written == expected
    assert load_encoder(workdir).widths == (8, 16)
    # With two devices instead of eight.
    (workdir / "checkpoints" / "12").rmtree()
    _, errors = commands.run("pretrain", *arguments, devices=2)
    assert "continuing at step 8" in errors
    np.testing.assert_allclose(losses_in(workdir), commands.losses(on_disk), rtol=1e-5)


def test_a_run_in_a_bucket_is_the_same_as_one_on_disk(images, on_disk, tmp_path):
    workdir = "gs://bucket/run"
    arguments = ("--config", "tests/tiny.py", "--workdir", workdir, f"--config.data.source=folder:{images[1]}", *COMMON)
    process = commands.start("pretrain", *arguments)
    printed = []
    for line in process.stderr:
        printed.append(line)
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, (printed, errors)
    # A damaged checkpoint is moved aside; the run continues from the one before.
    newest = max(int(path.name) for path in (epath.Path(workdir) / "checkpoints").glob("*"))
    (epath.Path(workdir) / "checkpoints" / str(newest) / "state" / "manifest.ocdbt").write_bytes(b"")
    _, errors = commands.run("pretrain", *arguments)
    assert f"continuing at step {(newest - 1) // 4 * 4} of 12" in errors
    assert [path.name for path in (epath.Path(workdir) / "checkpoints_unreadable").glob("*")] == [str(newest)]

    assert losses_in(workdir) == commands.losses(on_disk)
    assert (epath.Path(workdir) / "reconstructions" / "0000012.png").read_bytes().startswith(b"\x89PNG")
    assert any("tfevents" in path.name for path in (epath.Path(workdir) / "tensorboard").glob("*"))
    for name in ("loss.png", "progress.png"):
        assert (epath.Path(workdir) / name).read_bytes().startswith(b"\x89PNG")

    # Weights are exported from the bucket, and loaded from it.
    commands.run("convert", workdir, "--output", tmp_path / "out.safetensors")
    file = locate("gs://bucket/weights/out.safetensors", "path")
    file.write_bytes((tmp_path / "out.safetensors").read_bytes())
    local = load_encoder(str(on_disk))
    image = np.zeros((1, 32, 32, 3), np.uint8)
    for path in (str(file), f"{workdir}/encoder.safetensors"):
        for one, other in zip(local(image), load_encoder(path)(image), strict=True):
            np.testing.assert_array_equal(one, other)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"gs://bucket/weights/out\.safetensors is not"):
        load_encoder(str(file))


def test_a_tfds_data_set_in_a_bucket_is_read(images, tmp_path):
    commands.run("data.prepare", "--source", f"folder:{images[0]}", "--name=small", "--data_dir", tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            (epath.Path("gs://bucket/tfds") / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
    # In its own process: the reader of ArrayRecord reads the emulator's address from the environment once.
    program = (
        "from umae_jax.data.sources import open_source\n"
        "source = open_source('tfds:small', data_dir='gs://bucket/tfds')\n"
        "print(len(source), source.classes, source[3].data[:2], source[3].label)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=True, timeout=120
    )
    count, *classes, start, label = done.stdout.split()
    assert (count, " ".join(classes)) == ("16", "('ants', 'bees')")
    assert (start, int(label) in (0, 1)) == (r"b'\xff\xd8'", True)
