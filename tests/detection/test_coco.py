import copy
import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import annotated_images
from umae_jax.data.annotations import open_annotated
from umae_jax.data.instances import Polygons, crop_mask, encode, rasterize, window
from umae_jax.detection import coco
from umae_jax.detection.coco import KINDS, METRICS, evaluate, paste, to_detections, write_results
from umae_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden_numbers" / "detection"
SETS = ("fruitnuts18_instances", "nuclei150_instances")


def load(name):
    return [json.loads((GOLDEN / f"cocoeval_{name}_{part}.json").read_text()) for part in ("gt", "dets")]


@pytest.mark.parametrize("name", SETS)
def test_the_numbers_are_those_of_pycocotools_and_nothing_is_printed(name, capfd):
    truth, detections = load(name)
    before = copy.deepcopy((truth, detections))
    metrics = evaluate(truth, detections)
    assert capfd.readouterr() == ("", "")
    assert (truth, detections) == before
    stored = json.loads((GOLDEN / "cocoeval_stats.json").read_text())
    for kind, prefix in KINDS.items():
        assert [metrics[f"{prefix}_{metric}"] for metric in METRICS] == stored[f"{name}/{kind}"]
        classes = [metrics[f"{prefix}_ap/{category['name']}"] for category in truth["categories"]]
        assert np.mean([value for value in classes if value > -1]) == pytest.approx(metrics[f"{prefix}_ap"])


def test_one_kind_is_evaluated_alone():
    truth, detections = load(SETS[0])
    for detection in detections:
        del detection["segmentation"]
    metrics = evaluate(truth, detections, ("bbox",))
    assert metrics["box_ap"] == json.loads((GOLDEN / "cocoeval_stats.json").read_text())[f"{SETS[0]}/bbox"][0]
    assert not any(name.startswith("mask") for name in metrics)


def test_without_detections_everything_is_zero():
    truth, _ = load(SETS[0])
    metrics = evaluate(truth, [])
    assert {value for name, value in metrics.items() if "small" not in name} == {0.0}
    assert metrics["box_ap_small"] == metrics["mask_ar_small"] == -1  # there are no small objects


def test_without_objects_nothing_is_known():
    truth, detections = load(SETS[0])
    truth["annotations"] = []
    assert set(evaluate(truth, detections).values()) == {-1.0}
    assert set(evaluate(truth, []).values()) == {-1.0}


def test_only_the_given_images_count():
    truth, detections = load(SETS[1])
    ids = [image["id"] for image in truth["images"]][:2]
    part = {**truth, "images": truth["images"][:2]}
    part["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in ids]
    expected = evaluate(part, [entry for entry in detections if entry["image_id"] in ids])
    assert evaluate(truth, detections, image_ids=ids) == expected
    assert expected != evaluate(truth, detections)


def test_incomplete_ground_truth_is_completed():
    truth, detections = load(SETS[1])
    expected = evaluate(truth, detections)
    for entry in truth["annotations"]:
        if not entry["iscrowd"]:
            del entry["iscrowd"], entry["area"]  # which is that of the mask
        entry["id"] = 0
    assert evaluate(truth, detections) == expected
    truth["annotations"].append({"image_id": 5, "category_id": 1, "bbox": [0, 0, float("nan"), 3]})
    detections.append({"image_id": 999, "category_id": 1, "bbox": [0, 0, 3, 3], "score": 1.0})
    detections.append({"image_id": 5, "category_id": 999, "bbox": [0, 0, 3, 3], "score": 1.0})
    assert evaluate(truth, detections) == expected


def test_perfect_detections_have_an_ap_of_one():
    truth, _ = load(SETS[0])
    detections = []
    for entry in truth["annotations"]:
        if not entry["iscrowd"]:
            parts = tuple(np.array(part, np.float32) for part in entry["segmentation"])
            detections.append(
                {**entry, "score": 0.5, "segmentation": encode(rasterize(Polygons(parts), 600, 800), 600, 800)}
            )
    metrics = evaluate(truth, detections)
    assert metrics["box_ap"] == metrics["mask_ap"] == metrics["mask_ap/fig"] == pytest.approx(1)


def test_pasted_masks_are_those_of_the_reference():
    with np.load(GOLDEN / "c_mask.npz") as golden:
        probabilities, boxes = golden["paste_prob28"][:, 0], golden["paste_boxes"]
        height, width = golden["paste_full"].shape[1:]
        expected = np.unpackbits(golden["paste_bin"], axis=-1)[..., :width]
    for probability, box, mask in zip(probabilities, boxes, expected, strict=True):
        np.testing.assert_array_equal(window(paste(probability, box, height, width), 0, 0, width, height), mask)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_a_sure_mask_fills_its_box_but_for_corners(seed):
    rng = np.random.default_rng(seed)
    x1, y1 = rng.uniform(-20, 60, 2)
    x2, y2 = x1 + rng.uniform(0.01, 60), y1 + rng.uniform(0.01, 60)
    region = paste(np.ones((28, 28), np.float32), np.array([x1, y1, x2, y2]), 50, 60)
    x, y = np.arange(60) + 0.5, np.arange(50)[:, None] + 0.5
    shown = window(region, 0, 0, 60, 50) > 0
    left, right, upper, lower = x - x1, x2 - x, y - y1, y2 - y
    inside = np.minimum(np.minimum(left, right), np.minimum(upper, lower)) >= 0
    assert not (shown & ~inside).any()
    away_x = np.minimum(left, right) > (x2 - x1) / 56  # half a pixel of the mask
    away_y = np.minimum(upper, lower) > (y2 - y1) / 56
    assert shown[
        inside & (away_x | away_y) & (np.minimum(left, right) > 1e-3) & (np.minimum(upper, lower) > 1e-3)
    ].all()


def test_crops_of_the_annotated_masks_pasted_back_are_perfect_detections(tmp_path):
    source = open_annotated(annotated_images.write(tmp_path, annotated_images.coco()))
    detections = []
    for index in range(len(source)):
        (boxes, labels, masks), size = source.instances(index), source.sizes[index].tolist()
        crops = [crop_mask(rasterize(mask, *size), box, *size, 28) for mask, box in zip(masks, boxes, strict=True)]
        ids, scores = source.category_ids[labels], np.ones(len(boxes))
        detections += to_detections(
            source.image_ids[index], size, boxes, scores, ids, np.stack(crops) / np.float32(255)
        )
    metrics = evaluate(source.ground_truth(), detections)
    assert metrics["box_ap"] == pytest.approx(1)
    assert metrics["mask_ap75"] == pytest.approx(1)
    assert metrics["mask_ap"] > 0.9


def test_results_are_written_as_coco_reads_them(tmp_path):
    boxes = np.array([[10, 20, 40, 60], [0, 0, 5, 5]], np.float32)
    probabilities = np.stack([np.ones((28, 28)), np.zeros((28, 28))]).astype(np.float32)
    scores, categories = np.array([0.5, 0.25], np.float32), np.array([7, 90])
    found = to_detections(42, (100, 80), boxes, scores, categories, probabilities)
    write_results(tmp_path / "results.json", found)
    first, second = json.loads((tmp_path / "results.json").read_text())
    assert first["image_id"] == 42
    assert first["category_id"] == 7
    assert first["bbox"] == [10, 20, 30, 40]
    assert first["score"] == 0.5
    mask = reference.decode(first["segmentation"])
    assert mask.shape == (100, 80)
    assert mask.sum() == mask[20:60, 10:40].sum() == 30 * 40
    assert not reference.decode(second["segmentation"]).any()
    assert "segmentation" not in to_detections(42, (100, 80), boxes, scores, categories)[0]


def test_the_missing_package_is_named(monkeypatch):
    truth, detections = load(SETS[0])
    monkeypatch.setattr(coco.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"umae_jax\[detect\]"):
        evaluate(truth, detections)


def missing(name):
    raise ImportError(name)
