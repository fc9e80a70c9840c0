import errno
import os

import jax
import numpy as np
import pytest

from tests import golden, small, tiny, toy
from tests.runs import store
from umae_jax.config import METHODS
from umae_jax.features import load_encoder, read_encoder
from umae_jax.tasks import make_task
from umae_jax.training import finish
from umae_jax.training.metrics import MetricsWriter
from umae_jax.weights.encoder_file import ENCODER_FILE


@pytest.mark.parametrize("kind", ["swin_um_window8", "pvt_um", "vit_random", "simmim_swin", "swin_classifier"])
def test_the_encoder_file_equals_the_encoder_of_the_run(tmp_path, capsys, kind):
    config = golden.config_of(kind)
    workdir = tmp_path / "run"
    params = small.random_model(config)[1]
    store(workdir, config, params)
    task = make_task(config)
    task.source = range(2)
    finish.finish(task, workdir, params, 7)
    assert "warning" not in capsys.readouterr().err
    ours, theirs = read_encoder(workdir), read_encoder(workdir / ENCODER_FILE)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert theirs.config.model == config.model
    assert load_encoder(workdir / ENCODER_FILE).widths == config.model.widths


@pytest.mark.parametrize("name", ["loss.png", "progress.png", "encoder.safetensors"])
def test_an_error_is_a_warning(tmp_path, monkeypatch, capsys, name):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0, "learning_rate": 0.1})
    writer.close()
    task = make_task(tiny.get_config())
    monkeypatch.setattr(task, "pictures", lambda workdir: {"progress.png": b"png"})
    written = []

    def write(path, data):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)

    monkeypatch.setattr(finish, "write_atomic", write)
    finish.finish(task, tmp_path, small.random_model(task.config)[1], 1)
    warning, *rest = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert f"{tmp_path / name}: No space left on device" in warning
    assert not rest
    assert "encoder.safetensors" in written or name == "encoder.safetensors"


def test_a_task_without_encoder_has_its_curves_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "toy", toy.METHOD)
    config = tiny.get_config()
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0, "learning_rate": 0.1})
    writer.close()
    finish.finish(toy.Task(config), tmp_path, {"linear": jax.numpy.zeros(3)}, 1)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ENCODER_FILE).exists()
    assert not capsys.readouterr().err
