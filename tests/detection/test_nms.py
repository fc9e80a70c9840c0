"""Suppression, against mmdet's numbers and sequential loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.detection.golden import assert_close, load
from umae_jax.detection.boxes import pairwise_iou
from umae_jax.detection.nms import nms, nms_per_class, select_detections, soft_nms


def clustered(rng, count):
    """Return boxes of a few clusters, scores with ties, three labels and flags."""
    boxes = rng.uniform(0, 60, (6, 4))[rng.integers(0, 6, count)] + rng.normal(0, 4, (count, 4))
    boxes[:, 2:] = boxes[:, :2] + 20 + np.abs(boxes[:, 2:])
    scores = rng.integers(1, 20, count) / 20
    return boxes.astype(np.float32), scores.astype(np.float32), rng.integers(0, 3, count), rng.random(count) < 0.8


def greedy(boxes, scores, labels, valid, threshold):
    """Return the boxes that the sequential loop keeps."""
    iou, keep = np.asarray(pairwise_iou(boxes, boxes)), np.zeros(len(boxes), bool)
    for k in np.argsort(-scores, kind="stable"):
        rivals = keep & (labels == labels[k])
        keep[k] = valid[k] and not (iou[k, rivals] > threshold).any()
    return keep


@pytest.mark.parametrize("threshold", ["0.5", "0.7"])
def test_hard_suppression_equals_the_golden_numbers(threshold):
    golden = load("c_nms")
    boxes, scores, labels = (jnp.asarray(golden[key]) for key in ("boxes", "scores", "idx"))
    valid = jnp.ones(len(boxes), bool)
    kept = nms(boxes, scores, valid, float(threshold))
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(golden[f"nms{threshold}/keep"]))
    kept = nms_per_class(boxes, scores, labels, valid, float(threshold))
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(golden[f"batched_nms{threshold}/keep"]))


@pytest.mark.parametrize("seed", range(6))
def test_the_fixed_point_equals_the_sequential_loop(seed):
    boxes, scores, labels, valid = clustered(np.random.default_rng(seed), 150)
    for threshold in (0.3, 0.7):
        expected = greedy(boxes, scores, 0 * labels, valid, threshold)
        np.testing.assert_array_equal(jax.jit(nms)(boxes, scores, valid, threshold), expected)
        assert 3 < expected.sum() < 120
        expected = greedy(boxes, scores, labels, valid, threshold)
        np.testing.assert_array_equal(jax.jit(nms_per_class)(boxes, scores, labels, valid, threshold), expected)


def test_a_chain_of_overlaps_is_followed_to_its_end():
    x = 3 * jnp.arange(40.0)
    boxes = jnp.stack([x, 0 * x, x + 10, 0 * x + 10], axis=-1)  # each overlaps with its neighbours by more than 0.5
    kept = nms(boxes, jnp.ones(40), jnp.ones(40, bool), 0.5)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.arange(0, 40, 2))


@pytest.mark.parametrize(
    ("case", "min_score"),
    [*itertools.product(["linear", "gaussian"], ["0.001", "0.05"]), ("linear_iou0.5", "0.05")],
)
def test_soft_suppression_equals_the_golden_numbers(case, min_score):
    golden = load("c_nms")
    name = f"soft_{case}_{min_score}"
    boxes, scores, labels = (jnp.asarray(golden[key]) for key in ("boxes", "scores", "idx"))
    threshold = 0.5 if "iou0.5" in case else 0.3
    kinds = {"method": case.split("_")[0], "threshold": threshold, "sigma": 0.5, "min_score": float(min_score)}
    valid = jnp.ones(len(boxes), bool)
    detections = soft_nms(boxes, scores, labels, valid, **kinds, count=130)
    expected, keep = golden[f"{name}/dets"], golden[f"{name}/keep"]
    np.testing.assert_array_equal(detections.valid, np.arange(130) < len(keep))
    np.testing.assert_array_equal(detections.index[: len(keep)], keep)
    np.testing.assert_array_equal(detections.labels[: len(keep)], labels[keep])
    assert_close(f"{name} scores", detections.scores[: len(keep)], expected[:, 4])
    assert_close(f"{name} boxes", detections.boxes[: len(keep)], expected[:, :4])
    first = soft_nms(boxes, scores, labels, valid, **kinds, count=20)
    for few, many in zip(first, detections, strict=True):
        np.testing.assert_array_equal(few, many[:20])


@pytest.mark.parametrize("score_threshold", ["0.001", "0.05"])
@pytest.mark.parametrize(("case", "method", "threshold"), [("nms", "hard", 0.5), ("soft", "linear", 0.3)])
def test_selection_equals_the_golden_numbers(case, method, threshold, score_threshold):
    golden = load("c_nms")
    boxes, scores = jnp.asarray(golden["mc/boxes"]), jnp.asarray(golden["mc/scores"][:, :5])
    rule = {"score_threshold": float(score_threshold), "threshold": threshold, "count": 30, "method": method}
    detections = select_detections(boxes, scores, jnp.ones(60, bool), **rule)
    name = f"mc_{case}_{score_threshold}"
    np.testing.assert_array_equal(detections.labels, golden[f"{name}/labels"])
    np.testing.assert_array_equal(5 * detections.index + detections.labels, golden[f"{name}/flat_inds"])
    assert_close(f"{name} scores", detections.scores, golden[f"{name}/dets"][:, 4])
    assert_close(f"{name} boxes", detections.boxes, golden[f"{name}/dets"][:, :4])


def test_hard_selection_equals_sequential_loops_per_class_under_vmap():
    rng = np.random.default_rng(1)
    images = [clustered(rng, 70) for _ in range(2)]
    boxes, _, _, valid = (np.stack(arrays) for arrays in zip(*images, strict=True))
    scores = (rng.integers(0, 30, (2, 70, 20)) / 30).astype(np.float32)
    rule = {"score_threshold": 0.1, "threshold": 0.5, "count": 1500, "method": "hard"}  # more places than pairs
    select = jax.jit(jax.vmap(lambda *arrays: select_detections(*arrays, **rule)))
    result = jax.tree.map(np.asarray, select(boxes, scores, valid))
    for image in range(2):
        candidates = valid[image][:, None] & (scores[image] > 0.1)
        columns = [greedy(boxes[image], scores[image, :, c], np.zeros(70), candidates[:, c], 0.5) for c in range(20)]
        flat = np.where(np.stack(columns, -1), scores[image], -1).reshape(-1)
        order = np.argsort(-flat, kind="stable")[: (flat > 0).sum()]
        found = result.valid[image]
        np.testing.assert_array_equal(found, np.arange(1500) < len(order))
        np.testing.assert_array_equal((20 * result.index + result.labels)[image, found], order)
        np.testing.assert_array_equal(result.scores[image, found], flat[order])
        np.testing.assert_array_equal(result.boxes[image, found], boxes[image, order // 20])
        assert not any(array[image, ~found].any() for array in result)


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_images_without_boxes_have_no_detections(method):
    rule = {"score_threshold": 0.1, "threshold": 0.5, "count": 3, "method": method}
    result = select_detections(jnp.ones((4, 4)), jnp.ones((4, 2)), jnp.zeros(4, bool), **rule)
    assert not any(array.any() for array in result)
