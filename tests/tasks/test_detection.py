"""Runs of a detector on coloured shapes: trained, stopped, continued, evaluated; and what it rejects."""

import json
import logging
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from flax import nnx
from PIL import Image

from tests import annotated_images, tiny_detector
from tests.commands import lines
from tests.stopping_detector import Stops
from umae_jax import load_encoder
from umae_jax.config import to_json
from umae_jax.detection.detector import Detected, Detector
from umae_jax.errors import Preempted, UserError
from umae_jax.multihost import StopSignal
from umae_jax.tasks import evaluation, next_steps
from umae_jax.tasks.detection import Task
from umae_jax.training import programs as programs_module
from umae_jax.training import run as run_module
from umae_jax.training.run import train
from umae_jax.weights.stored_run import best_checkpoint, read_run

LANDSCAPE, PORTRAIT = (60, 90), (90, 60)
TRAINING, VALIDATION = 18 * (LANDSCAPE,), 11 * (LANDSCAPE,)


def write(folder, split, sizes):
    """Write coloured shapes on noise: `coco:FOLDER` for a split."""
    content = annotated_images.coco(sizes, objects=2)
    for image in content["images"]:
        image["file_name"] = f"{split}_{image['file_name']}"
    name = annotated_images.write(folder, content, split)
    for image in content["images"]:
        file = folder / "images" / image["file_name"]
        pixels = np.asarray(Image.open(file))
        noise = np.random.default_rng(image["id"]).integers(0, 60, pixels.shape, np.uint8)
        Image.fromarray(np.where(pixels.any(-1, keepdims=True), pixels, noise)).save(file)
    return name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Landscape images, which need one program; one of each split cannot be read."""
    folder = tmp_path_factory.mktemp("annotated")
    write(folder, "train", TRAINING)
    write(folder, "val", VALIDATION)
    for name in ("train_2.png", "val_3.png"):
        file = folder / "images" / name
        file.write_bytes(file.read_bytes()[:-400])
    return folder


def config_for(folder, **changes):
    config = tiny_detector.get_config()
    config.model.stages = 1
    config.data.source = config.validation.source = f"coco:{folder}"
    config.validation.every_epochs = 4.0  # 12 steps
    config.update_from_flattened_dict(changes)
    return config


class Program:
    """A compiled training step that counts its calls."""

    def __init__(self, compiled, calls, shape):
        self.compiled, self.calls, self.shape = compiled, calls, shape

    def compile(self):
        return self

    def __call__(self, *arguments):
        self.calls[self.shape] += 1
        return self.compiled(*arguments)

    def __getattr__(self, name):
        return getattr(self.compiled, name)


@pytest.fixture(scope="module", autouse=True)
def calls():
    """Compile the step of each configuration and canvas once for all runs; count the calls by shape of the images."""
    programs, steps, counts = {}, [], Counter()
    build, lower = run_module.build_step, programs_module.lower_step

    def build_step(task, *arguments):
        config = task.config
        sections = (Detector.losses, config.model, config.optimizer, config.augment, config.batch_size)
        steps.append((build(task, *arguments), str([*map(str, sections), *arguments[1:]])))
        return steps[-1][0]

    def lower_step(step, state, batch, mesh):
        config = next(config for known, config in steps if known is step)
        shape = batch["image"].shape
        key = config, shape, "semantic" in batch
        if key not in programs:
            programs[key] = lower(step, state, batch, mesh).compile()
        return Program(programs[key], counts, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_step", build_step)
        patch.setattr(programs_module, "lower_step", lower_step)
        yield counts


def run(task, workdir):
    with StopSignal() as stop:
        train(task, workdir, stop)
    return task


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run: its directory, its task, and the warnings."""
    workdir = tmp_path_factory.mktemp("detector")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    absl_logging.get_absl_logger().addHandler(handler)
    try:
        task = run(Task(config_for(data)), workdir)
    finally:
        absl_logging.get_absl_logger().removeHandler(handler)
    return workdir, task, records


def test_losses_fall_and_each_is_logged_by_its_name(finished):
    rows = [row for row in lines(finished[0]) if "loss" in row]
    assert [row["step"] for row in rows] == [*range(1, 25)]
    stage = {f"stage_0_{kind}" for kind in ("class", "box", "mask", "accuracy")}
    for row in rows:
        losses = {key: value for key, value in row.items() if key.startswith(("rpn_", "stage_"))}
        assert losses.keys() == {"rpn_class", "rpn_box"} | stage
        total = sum(value for key, value in losses.items() if "accuracy" not in key)
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["bad_steps"] == row["skipped_updates"] == 0
    for name in ("loss", "rpn_class", "stage_0_class", "stage_0_mask"):
        values = [row[name] for row in rows]
        assert np.mean(values[-4:]) < 0.8 * np.mean(values[:2]), name


def test_ap_is_measured_and_the_best_checkpoint_is_that_of_box_ap(finished):
    workdir, task, _ = finished
    measured = {row["step"]: row for row in lines(workdir) if "box_ap" in row}
    assert list(measured) == [12, 24]
    for row in measured.values():
        assert {"box_ap", "box_ap50", "box_ar100", "mask_ap", "mask_ap75"} <= row.keys()
        assert not any("/" in key for key in row)
        assert "box_ap_large" not in row  # there are no large objects
        assert row["validation_unreadable"] == 1
        assert all(0 <= value <= 1 for key, value in row.items() if key.startswith(("box_", "mask_")))
    assert measured[24]["box_ap50"] > 0.05
    assert measured[24]["mask_ap50"] > 0.05
    best = max((row["box_ap"], -step) for step, row in measured.items())
    assert best_checkpoint(workdir) == (best[0], workdir / "checkpoints" / str(-best[1]))
    assert task.results.images == len(VALIDATION) - 1
    assert all(0 <= score <= 1 for score in (entry["score"] for entry in task.results.detections))


def test_the_result_is_one_line_and_a_table_of_the_classes(finished, capsys):
    workdir, task, _ = finished
    assert task.result(workdir).startswith("best box AP ")
    printed = capsys.readouterr().err
    assert re.search(r"AP per class, last validation:\n +class +box AP +mask AP\n +disc ", printed)
    overview = task.overview()
    assert overview["objects"] == "36 of 2 classes, up to 2 per image"
    assert "64 x 96 and transposed for portrait images; shorter edge: 48 to 64 pixels" in overview["canvases"]


def test_pictures_and_files_of_a_run(finished):
    workdir = finished[0]
    for step in (12, 24):
        with Image.open(workdir / "detections" / f"{step:07}.png") as picture:
            assert picture.size[0] > 90
    assert json.loads((workdir / "classes.json").read_text()) == ["disc", "box"]
    stored = json.loads((workdir / "config.json").read_text())["model"]
    assert (stored["classes"], stored["masks"]) == (2, True)
    maps = load_encoder(workdir / "encoder.safetensors")(np.zeros((1, 64, 96, 3), np.uint8))
    assert [m.shape[1:] for m in maps] == [(16, 24, 8), (8, 12, 16), (4, 6, 16), (2, 3, 16)]
    for command in next_steps.after_detection(finished[1].config, workdir).values():
        assert str(workdir) in command


def detect_whole_images(_, images, image_size):
    """Return one object, which fills the image."""
    boxes = jnp.concatenate([jnp.zeros_like(image_size), image_size[:, ::-1]], 1)[:, None].astype(jnp.float32)
    ones = jnp.ones(boxes.shape[:2])
    return Detected(boxes, ones, ones.astype(jnp.int32), ones > 0, jnp.ones((*ones.shape, 28, 28)))


def test_each_orientation_has_a_program_for_training_and_evaluation(tmp_path, calls, monkeypatch):
    """Two programs of a whole detector would take minutes, so this one has the simplest loss."""
    monkeypatch.setattr(Detector, "losses", lambda model, *_: {"rpn_class": model.rpn.objectness.bias[...].sum()})
    monkeypatch.setattr(Detector, "__call__", detect_whole_images)
    validation = 6 * (LANDSCAPE,) + 5 * (PORTRAIT,)
    write(tmp_path, "train", 9 * (LANDSCAPE,) + 9 * (PORTRAIT,))
    write(tmp_path, "val", validation)
    before = calls.copy()
    task = run(Task(config_for(tmp_path)), tmp_path / "run")
    calls -= before
    assert calls.keys() == {(8, 64, 96, 3), (8, 96, 64, 3)}
    assert sum(calls.values()) == 24  # compiled ahead of time, so they cannot be compiled again
    assert min(calls.values()) >= 8  # each epoch has two batches of either orientation
    boxes = {entry["image_id"]: entry["bbox"] for entry in task.results.detections}
    assert boxes == {
        10 + number: pytest.approx([0, 0, width, height], abs=1e-3) for number, (height, width) in enumerate(validation)
    }


def test_an_unreadable_image_is_skipped_counted_and_named_once(finished):
    workdir, _, records = finished
    rows = [row for row in lines(workdir) if "loss" in row]
    assert rows[-1]["skipped_images"] >= 6  # twice per epoch at the end of a permutation, or more by copy-paste
    assert len([record for record in records if "train_2.png" in record]) == 1
    assert len([record for record in records if "val_3.png" in record]) == 1


# Stop and continue.


def test_a_run_stopped_and_continued_equals_one_never_stopped(finished, data, tmp_path):
    with StopSignal() as stop, pytest.raises(Preempted, match="step 7"):
        train(Stops(config_for(data), stop, 7), tmp_path, stop)
    assert lines(tmp_path)[-1]["step"] == 7
    run(Task(config_for(data)), tmp_path)
    assert lines(tmp_path) == lines(finished[0])
    ours, theirs = (nnx.to_flat_state(read_run(workdir).params) for workdir in (tmp_path, finished[0]))
    statistics = [variable[...] for _, variable in ours if isinstance(variable, nnx.BatchStat)]
    assert len(statistics) == 2  # mean and variance
    assert all(np.abs(array - array[0]).max() > 0 for array in statistics)
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


# Evaluation.


def test_evaluation_agrees_with_the_last_validation_for_another_batch_size(finished):
    workdir, task, _ = finished
    last = next(row for row in reversed(lines(workdir)) if "box_ap" in row)
    line, values = evaluation.evaluate_run(evaluation.open_run(workdir), batch_size=16)
    assert (values["step"], values["images"]) == (24, len(VALIDATION) - 1)
    for name in last.keys() - {"step", "validation_unreadable"}:
        assert values[name] == pytest.approx(last[name], abs=1e-6), name
    assert {"box_ap/disc", "box_ap/box", "mask_ap/disc", "mask_ap/box"} <= values.keys()
    assert re.fullmatch(
        r"box AP \d+\.\d\d% \(AP50 .*%\), mask AP .* of 10 images; 1 unreadable images do not count", line
    )
    written = json.loads((workdir / "detections.json").read_text())
    keys = [
        sorted((entry["image_id"], entry["category_id"], round(entry["score"], 4)) for entry in one)
        for one in (written, task.results.detections)
    ]
    assert keys[0] == keys[1]
    assert {entry["image_id"] for entry in written} <= {10 + number for number in range(11) if number != 3}
    assert {entry["category_id"] for entry in written} <= {3, 7}
    assert all("counts" in entry["segmentation"] for entry in written)


def test_the_best_checkpoint_can_be_evaluated(finished):
    best = best_checkpoint(finished[0])
    stored = evaluation.open_run(finished[0], best=True)
    assert str(stored.step) == best.folder.name
    assert evaluation.evaluate_run(stored, batch_size=8)[1]["box_ap"] == pytest.approx(best.value, abs=1e-6)


def test_detections_of_photographs_are_drawn_and_listed(finished, data, tmp_path, capsys, caplog):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for index, name in enumerate(("val_0.png", "val_1.png")):
        (photographs / f"{index}.png").write_bytes((data / "images" / name).read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to look at it
    with Image.open(data / "images" / "val_4.png") as image:
        image.save(photographs / "turned.jpg", exif=exif, quality=95)
    (photographs / "broken.png").write_bytes(b"no image")
    stored = evaluation.open_run(finished[0])
    predictions = list(evaluation.predict_run(stored, photographs, batch_size=4, output=tmp_path / "out"))
    assert [line.split(": ")[0].rsplit("/", 1)[-1] for line, _ in predictions] == ["0.png", "1.png", "turned.jpg"]
    pictures = {values["image"].rsplit("/", 1)[-1]: values["picture"] for _, values in predictions}
    sizes = {"0.png": (90, 60), "1.png": (90, 60), "turned.jpg": (60, 90)}
    for name, (width, height) in sizes.items():
        with Image.open(pictures[name]) as picture:  # small images are enlarged
            assert picture.width * height == picture.height * width
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written == [values for _, values in predictions]
    assert any(row["objects"] for row in written)
    for line, values in predictions:
        width, height = sizes[values["image"].rsplit("/", 1)[-1]]
        shown = [one for one in values["objects"] if one["score"] >= 0.3]
        assert line.endswith(", ".join(f"{one['class']} {one['score']:.1%}" for one in shown) or "nothing")
        for one in values["objects"]:
            x1, y1, x2, y2 = one["box"]
            assert -0.1 <= x1 <= x2 <= width + 0.1
            assert -0.1 <= y1 <= y2 <= height + 0.1
            assert one["class"] in ("disc", "box")
    printed = capsys.readouterr().err
    assert "3 pictures in " in printed
    assert "1 of 4 images cannot be read" in printed
    assert "broken.png" in caplog.text

    (_, values), *others = evaluation.predict_run(stored, photographs / "0.png", batch_size=8)
    assert others == []
    assert values["picture"].startswith(str(finished[0] / "detections"))
    with pytest.raises(UserError, match="--images: none of the images can be read"):
        list(evaluation.predict_run(stored, photographs / "broken.png", batch_size=8, output=tmp_path / "none"))


def test_validation_images_of_other_categories_are_rejected(finished, tmp_path):
    content = annotated_images.coco()
    content["categories"][0]["name"] = "triangle"
    name = annotated_images.write(tmp_path, content, split="val")
    stored = evaluation.open_run(finished[0], validation=name)
    with pytest.raises(UserError, match=r"^--validation: .*triangle.*disc, box"):
        evaluation.evaluate_run(stored, batch_size=8)


# Bad input.


def opened(config):
    task = Task(config)
    task.open()
    task.prepare()
    return task


@pytest.fixture(scope="module")
def boxes_only(tmp_path_factory):
    """Annotations without masks."""
    folder = tmp_path_factory.mktemp("boxes")
    content = annotated_images.coco()
    annotated_images.write(folder, content)
    for entry in content["annotations"]:
        del entry["segmentation"]
    for split in ("train", "val"):
        (folder / f"annotations_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.canvas_widths": (96, 128)}, r"^data.canvas_widths has 2 number\(s\), data.canvas_heights 1"),
        ({"data.canvas_heights": (68,), "image_size": (68, 96)}, r"^data.canvas_heights, .*68 x 96 .*multiples of 32"),
        (
            {"data.canvas_heights": (96,), "data.canvas_widths": (64,), "image_size": (96, 64)},
            r"^data.canvas_heights, .*96 x 64 is no canvas",
        ),
        (
            {"data.canvas_heights": (64, 64), "data.canvas_widths": (64, 96)},
            r"^data.canvas_heights, data.canvas_widths: .* must ascend",
        ),
        ({"data.short_edge": (48, 80)}, r"^data.short_edge: \(48, 80\) .* up to 64"),
        ({"data.short_edge": (64, 48)}, r"^data.short_edge: \(64, 48\)"),
        ({"data.short_edge": (48,)}, r"^data.short_edge: \(48,\)"),
        ({"augment.jitter": (0.5,)}, r"^augment.jitter: \(0.5,\)"),
        ({"image_size": (64, 64)}, r"^image_size is \(64, 64\), but the last canvas \(64, 96\)"),
        ({"model.classes": 3}, r"^model.classes is 3, .* has 2 categories; write --config.model.classes=2"),
        ({"model.semantic_classes": 4}, r"^data.semantic: .*--config.model.semantic_classes=0"),
        ({"data.semantic": "maps"}, r"^model.semantic_classes: .*leave data.semantic out"),
        ({"data.source": "coco:nowhere"}, r"^data.source: there is no folder nowhere"),
        ({"data.source": "photos"}, r"^data.source: unknown source 'photos'; write coco:"),
        ({"validation.source": "coco:nowhere"}, r"^validation.source: there is no folder nowhere"),
        ({"validation.split": "test"}, r"^validation.split: 'test'.* train or val"),
    ],
)
def test_wrong_configurations_are_named_by_key_and_value(data, changes, message):
    with pytest.raises(UserError, match=message) as error:
        opened(config_for(data, **changes))
    assert "\n" not in str(error.value)


def test_semantic_maps_are_checked_before_training(data, tmp_path):
    changes = {"data.semantic": str(tmp_path), "model.semantic_classes": 4}
    with pytest.raises(UserError, match=r"^data.semantic: train_0.png in .* cannot be read"):
        opened(config_for(data, **changes))
    labels = np.full(LANDSCAPE, 255, np.uint8)
    Image.fromarray(labels).save(tmp_path / "train_0.png")
    opened(config_for(data, **changes))
    labels[5, 7] = 6
    Image.fromarray(labels).save(tmp_path / "train_0.png")
    with pytest.raises(UserError, match=r"^model.semantic_classes is 4, .* class 6; .*semantic_classes=7 or more"):
        opened(config_for(data, **changes))


def test_masks_need_annotations_with_masks(boxes_only, capsys):
    with pytest.raises(UserError, match=r"^model.masks: .*boxes only; write --config.model.masks=False"):
        opened(config_for(boxes_only, **{"model.masks": True}))
    config = config_for(boxes_only, **{"augment.copy_paste": 0.5})
    opened(config)
    assert (config.model.masks, config.augment.copy_paste) == (False, 0.0)
    assert "augment.copy_paste needs masks" in capsys.readouterr().err


def test_training_and_validation_have_the_same_categories(data, tmp_path):
    content = annotated_images.coco()
    content["categories"][0]["name"] = "triangle"
    annotated_images.write(tmp_path, content, split="val")
    with pytest.raises(UserError, match=r"^validation.source: .*triangle.*disc, box"):
        opened(config_for(data, **{"validation.source": f"coco:{tmp_path}"}))


def test_a_run_of_other_classes_is_not_continued(finished, tmp_path):
    content = annotated_images.coco(TRAINING, objects=2)
    content["categories"][0]["name"] = "triangle"
    for split in ("train", "val"):
        annotated_images.write(tmp_path, content, split=split)
    with pytest.raises(UserError, match=r"other classes \(.*triangle"):
        run(Task(config_for(tmp_path)), finished[0])


def test_without_validation_images_ap_is_not_measured(data, capsys):
    task = opened(config_for(data, **{"validation.source": None}))
    assert (task.validation, task.measured_last) == (None, None)
    assert list(task.hooks(None)) == []
    assert "AP is not measured" in capsys.readouterr().err
    stored = Task(config_for(data, **{"validation.source": None}))
    with pytest.raises(UserError, match=r"^--validation is missing"):
        stored.evaluate(stored, None, 8)


def test_a_plan_assumes_coco():
    config = tiny_detector.get_config()
    assert Task(config).assume_data() == 117_266
    assert (config.model.classes, config.model.masks) == (80, True)
    config.model.update({"classes": 3, "masks": False})
    Task(config).assume_data()
    assert (config.model.classes, config.model.masks) == (3, False)
    assert "detector" in to_json(config)
    assert jax.tree.leaves(Task(config).batch())
