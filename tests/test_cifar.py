"""The experiment of configs/cifar, with tiny models and data."""

import json
import sys
import zipfile

import pytest
from absl import flags
from PIL import Image

from tests import experiments
from tests.commands import ROOT, xla_flags
from tests.images import picture

CLASSES = ("cat", "dog")
TINY = ("widths=(8,16,32)", "depths=(1,1,1)", "position_width=4")


@pytest.fixture(scope="module")
def experiment():
    with experiments.load("cifar") as module:
        yield module


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Write 12 training and 6 test images for each of two classes."""
    path = tmp_path_factory.mktemp("archive") / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 12), ("test", 6)):
            for kind, name in enumerate(CLASSES):
                for number in range(count):
                    with file.open(f"{split}/{name}/{number:04}.jpg", "w") as image:
                        Image.fromarray(picture(100 * kind + number, 32, 32)).save(image, "JPEG")
    return path


def test_unpack_links_labelled_and_held_out_images(experiment, archive, tmp_path):
    for _ in range(2):  # the second call does nothing
        experiment.unpack(archive, tmp_path / "data", labelled=5, held_out=3)
    names = {
        part: sorted(path.name for path in (tmp_path / "data" / part / "dog").iterdir())
        for part in ("train", "labelled", "held_out", "test")
    }
    assert len(names["train"]) == 12
    assert names["labelled"] == [f"{number:04}.jpg" for number in range(5)]
    assert names["held_out"] == [f"{number:04}.jpg" for number in range(9, 12)]
    assert len(names["test"]) == 6


def test_more_labels_than_images_are_an_error(experiment, archive, tmp_path):
    with pytest.raises(SystemExit, match=r"--labelled.*cat has 12 images"):
        experiment.unpack(archive, tmp_path / "data", labelled=10, held_out=3)
    assert not (tmp_path / "data").exists()


def test_a_directory_rejects_other_settings(experiment, archive, tmp_path):
    for labelled in (5, 5, 6):
        flags.FLAGS.unparse_flags()
        flags.FLAGS([sys.argv[0], f"--zip={archive}", f"--workdir={tmp_path}", f"--labelled={labelled}"])
        if labelled == 6:
            with pytest.raises(SystemExit, match="--labelled"):
                experiment.keep_settings(tmp_path)
        else:
            assert experiment.keep_settings(tmp_path)["labelled"] == 5


def test_the_table_has_mean_and_standard_deviation(experiment, tmp_path):
    rows = {
        "from scratch": [{"top1": 0.5}, {"top1": 0.7}],
        "UM-MAE": [{"top1": 0.8, "pretrain_seconds": 60.0}, {"top1": 0.8, "pretrain_seconds": 120.0}],
    }
    table = experiment.summarize(rows)
    assert table["from scratch"]["top1"] == {"mean": 0.6, "std": pytest.approx(0.02**0.5), "values": [0.5, 0.7]}
    assert table["UM-MAE"]["pretrain_seconds"]["mean"] == 90
    assert experiment.summarize({"one": [{"top1": 0.5}]})["one"]["top1"]["std"] is None


def test_the_plot_is_written(experiment, tmp_path):
    rows = {"from scratch": [{"top1": 0.5}], "UM-MAE": [{"top1": 0.8, "pretrain_processor_seconds": 60.0}]}
    experiment.draw(experiment.summarize(rows), tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        assert image.width > 100


def test_the_pages_show_the_stored_results(experiment):
    rows = json.loads((ROOT / "configs" / "cifar" / "results" / "table.json").read_text())["rows"]
    lines = experiment.markdown(rows).splitlines()
    assert set(lines) <= set((ROOT / "docs" / "reproducing.md").read_text().splitlines())
    shown = set((ROOT / "README.md").read_text().splitlines())
    assert {line for line in lines[2:] if line.split(" | ")[0] in ("| from scratch", "| SimMIM", "| UM-MAE")} <= shown


def test_a_row_pretrains_probes_and_finetunes_once(experiment, archive, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    both = [f"--both=--config.model.{change}" for change in TINY]
    few = ["--both=--config.batch_size=8", "--pretrain_epochs=1", "--finetune_epochs=2", "--labelled=8", "--held_out=3"]
    smaller = ["--pretrain=--config.model.decoder_width=16", "--finetune=--config.model.classes=2"]
    flags.FLAGS([sys.argv[0], f"--zip={archive}", f"--workdir={tmp_path}", *both, *few, *smaller])
    trial = experiment.Experiment(tmp_path)
    experiment.unpack(archive, trial.data, 8, 3)
    method = experiment.METHODS["UM-MAE, no secondary masking"]
    rates = {"pretrain": 1.0, "finetune": 0.3}
    row = trial.row("UM-MAE", method, rates, seed=1)
    times = {"pretrain_seconds", "pretrain_processor_seconds", "finetune_seconds"}
    assert row.keys() == {*times, "pretrain_memory", "knn_top1", "top1"}
    assert 0 <= row["knn_top1"] <= 1
    assert 0 <= row["top1"] <= 1
    assert row["pretrain_seconds"] > 0
    assert row["pretrain_memory"] > 50
    assert trial.row("UM-MAE", method, rates, seed=1) == row  # finished commands do not run again
