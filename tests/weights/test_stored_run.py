import json
import logging
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from tests import commands, tiny, tiny_classifier
from tests.runs import store
from umae_jax.config import CONFIG_FILE
from umae_jax.errors import UserError
from umae_jax.models.build import build_model
from umae_jax.weights.stored_run import CLASSES_FILE, read_run


@pytest.fixture(scope="module")
def model():
    config = tiny.get_config()
    return config, nnx.state(build_model(config, nnx.Rngs(1)), nnx.Param)


@pytest.fixture
def run(model, tmp_path):
    store(tmp_path / "run", *model)
    return tmp_path / "run"


def test_reads_parameters_onto_all_devices_or_with_a_given_sharding(run, model):
    config, params = model
    stored = read_run(run)
    assert (stored.step, stored.classes) == (7, ())
    assert stored.config.to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, stored.params, params)
    assert all(len(array.sharding.device_set) == jax.device_count() for array in jax.tree.leaves(stored.params))
    sharding = SingleDeviceSharding(jax.devices()[3])
    stored = read_run(run, sharding=sharding)
    assert {array.sharding for array in jax.tree.leaves(stored.params)} == {sharding}
    assert isinstance(nnx.merge(stored.graph, stored.params), nnx.Module)


def test_reads_the_average_of_a_run_that_keeps_one(model, tmp_path):
    config = tiny.get_config()
    config.optimizer.ema_decay = 0.9
    store(tmp_path / "run", config, model[1])
    state = tmp_path / "run" / "checkpoints" / "7" / "state"
    assert "average" in (state / "_METADATA").read_text()
    jax.tree.map(np.testing.assert_array_equal, read_run(tmp_path / "run").params, model[1])


def test_reads_an_older_checkpoint_if_the_newest_is_damaged(run, caplog):
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "9")
    for path in (run / "checkpoints" / "9" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert read_run(run).step == 7
    assert "checkpoints/9 cannot be read" in caplog.text
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]  # unchanged


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints_best"])
def test_reads_the_best_checkpoint(run, folder):
    with pytest.raises(UserError, match="no best checkpoint"):
        read_run(run, best=True)
    shutil.copytree(run / "checkpoints" / "7", run / folder / "4")
    metric = {"validation_top1": 0.5}
    data = {"best": metric, "skipped_images": 0} if folder == "checkpoints" else metric
    (run / folder / "4" / "data" / "metadata").write_text(json.dumps({"samples": 0, **data}))
    assert read_run(run, best=True).step == 4
    assert read_run(run).step == 7


def test_class_names_come_from_their_file_or_an_old_configuration(tmp_path):
    config = tiny_classifier.get_config()
    config.model.classes = 2
    run = tmp_path / "run"
    store(run, config, nnx.state(build_model(config, nnx.Rngs(1)), nnx.Param))
    assert read_run(run).classes == ()
    values = json.loads((run / CONFIG_FILE).read_text())
    values["data"]["class_names"] = ["ant", "bee"]
    (run / CONFIG_FILE).write_text(json.dumps(values))
    assert read_run(run).classes == ("ant", "bee")
    (run / CLASSES_FILE).write_text(json.dumps(["cat", "dog"]))
    assert read_run(run).classes == ("cat", "dog")


def test_a_directory_without_a_checkpoint_raises_a_user_error(run, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        read_run(run)


def test_imports_no_training_code():
    program = "import sys, umae_jax.weights.stored_run; print([m for m in sys.modules if 'umae_jax.training' in m])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=commands.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
