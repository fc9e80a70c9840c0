"""Assignment by IoU, against mmdet's numbers and a loop over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.detection.golden import assert_close, load
from umae_jax.detection import assignment
from umae_jax.detection.assignment import assign
from umae_jax.detection.boxes import pairwise_iou

RULES = {
    "rpn": {"positive": 0.7, "negative": 0.3, "low_quality": True, "min_positive": 0.3},
    "r50": {"positive": 0.5, "negative": 0.5, "low_quality": True, "min_positive": 0.5},
    "r60": {"positive": 0.6, "negative": 0.6, "low_quality": True, "min_positive": 0.6},
    "r70": {"positive": 0.7, "negative": 0.7, "low_quality": True, "min_positive": 0.7},
    "r50_nolow": {"positive": 0.5, "negative": 0.5, "low_quality": False, "min_positive": 0.5},
}


@pytest.mark.parametrize("name", RULES)
def test_assignments_equal_the_golden_numbers(name):
    golden = load("c_assign")
    priors = jnp.asarray(golden["priors"])
    gts = jnp.asarray(np.concatenate([golden["gt"], golden["priors"][:3]]))  # priors as gts that must not count
    valid = jnp.arange(9) < 6
    result = assign(priors, gts, valid, **RULES[name])
    np.testing.assert_array_equal(result.gt_index, golden[f"{name}/gt_inds"])
    assert_close(f"max iou {name}", result.max_iou, golden[f"{name}/max_iou"])
    labels = np.where(result.gt_index > 0, golden["gt_labels"][np.maximum(result.gt_index, 1) - 1], -1)
    np.testing.assert_array_equal(labels, golden[f"{name}/labels"])
    no_gts = assign(priors, gts, jnp.zeros(9, bool), **RULES[name])
    np.testing.assert_array_equal(no_gts.gt_index, golden[f"{name}/gt_inds_nogt"])
    np.testing.assert_array_equal(no_gts.max_iou, np.zeros(len(priors)))


@pytest.mark.parametrize("pairs", [1, 200, 450, 10**6])
def test_blocks_of_gts_change_nothing_and_later_gts_win(pairs, monkeypatch):
    # Integer boxes on a small grid: many equal IoUs.
    corners = np.random.default_rng(3).integers(0, 6, (110, 2, 2))
    corners.sort(axis=1)
    boxes = np.add(corners, [[0, 0], [1, 1]]).reshape(-1, 4).astype(np.float32)
    priors, gts = boxes[:100], boxes[100:]
    gts[0] = gts[9] = priors[0] = [0, 0, 7, 7]  # the low-quality rule gives the last of equal gts the best prior,
    priors[1] = [0, 0, 6, 7]  # and a prior above the threshold goes to the first
    valid = np.arange(10) != 4
    rule = RULES["rpn"] | {"min_positive": 0.2}
    iou = np.array(pairwise_iou(gts, priors)) * valid[:, None]
    expected = np.full(100, -1)
    expected[iou.max(0) < 0.3] = 0
    expected[iou.max(0) >= 0.7] = 1 + iou.argmax(0)[iou.max(0) >= 0.7]
    for k in np.flatnonzero(valid & (iou.max(1) >= 0.2)):
        expected[iou[k] == iou[k].max()] = k + 1
    monkeypatch.setattr(assignment, "MAX_PAIRS", pairs)
    result = jax.jit(lambda *arrays: assign(*arrays, **rule))(priors, gts, valid)
    np.testing.assert_array_equal(result.gt_index, expected)
    assert expected[:2].tolist() == [10, 1]
    assert len(set(expected.tolist())) > 6
