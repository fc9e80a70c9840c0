"""The table and the warnings of a run before its first step."""

import shutil
from types import SimpleNamespace

import jax
import pytest
from etils import epath

from tests import tiny
from tests.images import write_folder
from umae_jax import pretrain
from umae_jax.config import default_config
from umae_jax.errors import UserError
from umae_jax.tasks import make_task
from umae_jax.training import overview as overview_module
from umae_jax.training.overview import Schedule, check_same_data, describe
from umae_jax.training.sharding import make_mesh
from umae_jax.training.state import abstract_run


@pytest.fixture
def overview(capsys, tmp_path, monkeypatch):
    """Return a function that describes a run and returns what it printed."""

    def run(config, schedule, data=(), images=1000):
        task = make_task(config)
        task.source = range(images)
        monkeypatch.setattr(type(task), "data_digest", "new")
        mesh = make_mesh()
        describe(task, abstract_run(task, mesh), mesh, epath.Path(tmp_path), schedule, dict(data))
        return capsys.readouterr().err

    return run


def rows(printed):
    return {line[2:17].strip(): line[17:] for line in printed.splitlines() if line.startswith("  ")}


def test_the_table_states_what_the_run_will_do(overview, tmp_path):
    config = tiny.get_config()
    config.optimizer.base_learning_rate, config.checkpoint_keep = 0.032, 2
    printed = overview(config, Schedule(first_step=5, warmup=200, total=5000, checkpoint_every=250))
    table = rows(printed)
    parameters = sum(array.size for array in jax.tree.leaves(abstract_run(make_task(config), make_mesh()).state.params))
    assert table["model"] == f"swin of other sizes, um_mae; {parameters:,} parameters"
    assert table["images"] == "1,000 in photos"
    assert table["image size"] == "32 x 32 pixels, 3 channels"
    assert table["batch"] == "16 images, 2 per device"
    assert table["schedule"] == "5,000 steps = 80 epochs of 62.5 steps"
    assert table["learning rate"] == "warm-up of 200 steps to 0.002, then cosine decay"
    assert table["devices"].startswith("8 ")
    assert table["checkpoints"].startswith("every 250 steps, 0 MiB each, 0 MiB in all, ")
    assert table["directory"] == str(tmp_path)
    assert printed.endswith("continuing at step 5 of 5000\n")


def test_a_preset_is_named(overview):
    config = default_config("pvt_small", "simmim")
    config.image_size = (64, 64)
    table = rows(overview(config, Schedule(0, 10, 5000, 1000)))
    assert table["model"].startswith("pvt_small, simmim; ")


def test_each_pair_of_settings_that_does_not_fit_is_one_warning(overview, monkeypatch):
    config = tiny.get_config()
    config.dtype = "bfloat16"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    printed = overview(config, Schedule(0, 2, 12, 5), images=15)
    starts = [line.partition(":")[2].partition(":")[0] for line in printed.splitlines() if line.startswith("warning")]
    assert starts == [" batch_size", " total_steps", " dtype", " checkpoint_keep"]


def test_nothing_is_warned_about_where_all_fits(overview):
    assert "warning" not in overview(tiny.get_config(), Schedule(0, 2, 5000, 1000))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"images": 900, "images_digest": "old"}, "1,000 images, but 900 when the checkpoint was written"),
        ({"images": 1000, "images_digest": "old"}, "as many images as when the checkpoint was written"),
        ({"total_steps": 100}, "the learning rate continues at 0.00999, not 0"),
    ],
)
def test_what_has_changed_since_the_checkpoint_is_said(overview, data, words):
    config = tiny.get_config()
    config.optimizer.update(base_learning_rate=0.16, final_learning_rate=0.0)
    before = {"images": 1000, "images_digest": "", "total_steps": 5000}
    schedule = Schedule(100, 2, 5000, 1000)
    assert "warning" not in overview(config, schedule, before)
    printed = overview(config, schedule, before | data)
    assert printed.count("warning") == 1
    assert words in printed


def test_a_run_says_what_it_reads_and_a_resume_what_has_changed(tmp_path, capsys):
    images = write_folder(tmp_path / "images", 20)
    (images / "._000.jpg").write_bytes(b"")

    def train(steps):
        """Train in a directory among the images."""
        config = tiny.get_config()
        config.data.source, config.total_steps = f"folder:{images}", steps
        pretrain(config, images / "run")
        return capsys.readouterr().err

    errors = train(12)
    assert f"data.source: 20 images in {images}; left out: 1 hidden or system (first ._000.jpg)\n" in errors
    assert "checkpoint was written" not in errors
    (images / "000.jpg").rename(images / "new.jpg")
    errors = train(13)
    assert "1 written by a run (first run/)" in errors
    assert "as many images as when the checkpoint was written, but with other names" in errors


def test_processes_that_see_other_images_do_not_train(monkeypatch):
    task = make_task(tiny.get_config())
    task.source = range(20)
    monkeypatch.setattr(type(task), "data_digest", "names")
    check_same_data(task)
    monkeypatch.setattr(overview_module, "all_gather_json", lambda mine: [mine, [19, *mine[1:]]])
    with pytest.raises(UserError, match=r"data.source: process 1 sees 19 images, process 0 20"):
        check_same_data(task)
