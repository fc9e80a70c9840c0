"""The experiment of configs/small_detection, with tiny models and data."""

import json
import sys
import zipfile

import pytest
from absl import flags
from PIL import Image

from tests import experiments
from tests.annotated_images import coco, write
from tests.commands import ROOT, xla_flags
from tests.images import picture

TINY = (*("widths=(8,8,16,16)", "depths=(1,1,1,1)", "heads=(1,1,2,2)", "window=4", "position_width=4"),)
TINY_DETECTOR = (
    *("pyramid_width=8", "box_hidden=8", "rpn_samples=8", "roi_samples=8"),
    *("train_proposals=8", "test_proposals=8", "detections=4"),
)


@pytest.fixture(scope="module")
def experiment():
    with experiments.load("small_detection") as module:
        yield module


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Write the three archives, with four training images and four for validation in each annotated one."""
    folder = tmp_path_factory.mktemp("archives")
    for name in ("nuclei150_instances", "bccd364_boxes"):
        part = tmp_path_factory.mktemp(name)
        content = coco()
        write(part, content)
        for split in ("train", "val"):
            (part / f"annotations_{split}.json").write_text(json.dumps(content))
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
            for path in part.rglob("*.*"):
                file.write(path, path.relative_to(part))
    with zipfile.ZipFile(folder / "imagenet_sample.zip", "w") as file:
        for number in range(5):
            with file.open(f"photo{number}.JPEG", "w") as image:
                Image.fromarray(picture(number, 48, 40)).save(image, "JPEG")
    return folder


def run_of(box_ap, **numbers):
    curve = {"step": [2, 4], "box_ap": [0.1, box_ap], "mask_ap": []}
    return {"box_ap": box_ap, "detect_processor_seconds": 60.0, "curve": curve, **numbers}


def test_unpack_links_the_training_images_and_the_photographs(experiment, archives, tmp_path):
    for _ in range(2):  # the second call does nothing
        experiment.unpack(archives, tmp_path)
    names = {path.name for path in (tmp_path / "unlabelled" / "bccd364_boxes").iterdir()}
    assert names == {*(f"{number}.png" for number in range(4)), *(f"photo{number}.JPEG" for number in range(5))}


def test_missing_archives_are_an_error(experiment, tmp_path):
    with pytest.raises(SystemExit, match=r"--archives: .*nuclei150_instances.zip does not exist"):
        experiment.unpack(tmp_path, tmp_path / "data")


def test_a_directory_rejects_other_settings(experiment, tmp_path):
    for steps in (5, 5, 6):
        flags.FLAGS.unparse_flags()
        flags.FLAGS([sys.argv[0], "--archives=.", f"--workdir={tmp_path}", f"--pretrain_steps={steps}"])
        if steps == 6:
            with pytest.raises(SystemExit, match="--pretrain_steps"):
                experiment.keep_settings(tmp_path)
        else:
            assert experiment.keep_settings(tmp_path)["pretrain_steps"] == 5


def test_the_table_has_mean_and_standard_deviation(experiment):
    table = experiment.summarize({"UM-MAE": [run_of(0.5, pretrain_steps=10), run_of(0.7, pretrain_steps=10)]})
    assert table["UM-MAE"]["box_ap"] == {"mean": 0.6, "std": pytest.approx(0.02**0.5), "values": [0.5, 0.7]}
    assert len(table["UM-MAE"]["curve"]) == 2
    (line,) = experiment.markdown({"cells": table}).splitlines()[4:]
    assert line == "| cells | UM-MAE | 2 | 60.0 ± 14.1 |  |  |  | 10 |  | 1.0 ± 0.0 |"


def test_the_time_of_interrupted_runs_does_not_count(experiment):
    runs = [run_of(0.5, pretrain_processor_seconds=seconds) for seconds in (None, 60.0)]
    assert experiment.summarize({"UM-MAE": runs})["UM-MAE"]["pretrain_processor_seconds"]["mean"] == 60
    assert "|  | 1.0 |" in experiment.markdown({"cells": experiment.summarize({"UM-MAE": runs[:1]})})


def test_the_plot_is_written(experiment, tmp_path):
    table = experiment.summarize({"from scratch": [run_of(0.5), run_of(0.7)], "UM-MAE": [run_of(0.8)]})
    experiment.draw({"cells": table, "nuclei": table}, tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        assert image.width > 100


def test_simmim_gets_the_processor_time_of_um_mae(experiment, tmp_path, monkeypatch):
    flags.FLAGS.unparse_flags()
    flags.FLAGS([sys.argv[0], "--archives=.", f"--workdir={tmp_path}", "--pretrain_steps=900"])
    seconds = {"um_mae": 0.2, "simmim": 0.6}

    def run(command, config, workdir, overrides):
        steps = int(dict(flag.split("=", 1) for flag in overrides)["--config.total_steps"])
        return experiment.Result([], steps, 30 + steps * seconds[config.partition(":")[2]])  # 30 seconds to start

    monkeypatch.setattr(experiment, "run", run)
    trial = experiment.Experiment(tmp_path)
    assert trial.pretrain_steps("UM-MAE") == 900
    assert trial.pretrain_steps("SimMIM") == 300


def test_a_row_pretrains_and_trains_a_detector_once(experiment, archives, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    both = [f"--both=--config.model.{change}" for change in TINY]
    pretrain = [f"--pretrain=--config.{change}" for change in ("batch_size=4", "image_size=(64,64)")]
    detect = [
        f"--detect=--config.{change}"
        for change in (
            *(f"model.{change}" for change in TINY_DETECTOR),
            *("image_size=(64,64)", "data.canvas_heights=(64,)", "data.canvas_widths=(64,)"),
            *("data.short_edge=(48,64)", "validation.short_edge=64", "total_epochs=2", "validation.every_epochs=1"),
        )
    ]
    flags.FLAGS.unparse_flags()
    flags.FLAGS([sys.argv[0], "--archives=.", f"--workdir={tmp_path}", "--pretrain_steps=2", *both, *pretrain, *detect])
    trial = experiment.Experiment(tmp_path)
    experiment.unpack(archives, trial.data)
    row = trial.row("UM-MAE", "nuclei", seed=1)
    aps = {"box_ap", "box_ap50", "mask_ap", "mask_ap50"}
    assert row.keys() == {*aps, "pretrain_steps", "pretrain_processor_seconds", "detect_processor_seconds", "curve"}
    assert row["pretrain_steps"] == 2
    assert row["curve"]["step"] == [1, 2]
    assert len(row["curve"]["mask_ap"]) == 2
    assert "loaded" in (tmp_path / "seed1" / "nuclei" / "UM-MAE" / "detect" / "log.txt").read_text()
    assert trial.row("UM-MAE", "nuclei", seed=1) == row  # finished commands do not run again
