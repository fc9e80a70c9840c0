"""Box arithmetic, against mmdet's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.detection.golden import assert_close, load
from umae_jax.detection import boxes

STDS = {
    "rpn": (1.0, 1.0, 1.0, 1.0),
    "s0": (0.1, 0.1, 0.2, 0.2),
    "s1": (0.05, 0.05, 0.1, 0.1),
    "s2": (0.033, 0.033, 0.067, 0.067),
}


@pytest.mark.parametrize("name", STDS)
def test_coding_equals_the_golden_numbers(name):
    golden, std = load("c_coder"), STDS[name]
    priors, gts, deltas = (jnp.asarray(golden[key]) for key in ("priors", "gts", "deltas"))
    assert_close(f"encode {name}", boxes.encode(priors, gts, std), golden[f"encode_{name}"])
    assert_close(f"decode {name}", boxes.decode(priors, deltas, std), golden[f"decode_{name}"])
    clipped = boxes.decode(priors, deltas, std, jnp.asarray([100, 140]))
    assert_close(f"decode and clip {name}", clipped, golden[f"decode_clip_{name}"])


def test_decode_inverts_encode():
    corners = np.random.default_rng(0).uniform(0, 100, (2, 3, 50, 2, 2)).astype(np.float32)
    corners.sort(axis=-2)
    a, b = (jnp.asarray(side) for side in np.add(corners, [[0, 0], [40, 40]]).astype(np.float32).reshape(2, 3, 50, 4))
    np.testing.assert_allclose(boxes.decode(a, boxes.encode(a, b, STDS["s2"]), STDS["s2"]), b, atol=1e-3)


def test_deltas_of_padding_are_finite():
    empty, some = jnp.zeros((1, 4)), jnp.asarray([[1.0, 2.0, 30.0, 40.0]])
    for prior, target in ((empty, empty), (some, empty), (empty, some)):
        assert jnp.isfinite(boxes.encode(prior, target, STDS["s2"])).all()


def test_overlaps_equal_the_golden_numbers():
    golden = load("c_assign")
    gts, priors = jnp.asarray(golden["gt"]), jnp.asarray(golden["priors"])
    assert_close("iou", boxes.pairwise_iou(gts, priors), golden["iou"])
    assert_close("giou", boxes.giou(gts[:, None], priors[None]), golden["giou_matrix"])


def test_giou_loss_and_gradient_equal_the_golden_numbers():
    golden = load("c_losses_resize")
    predicted, target = jnp.asarray(golden["giou_pred"]), jnp.asarray(golden["giou_target"])
    each = 10 * (1 - boxes.giou(predicted, target))
    assert_close("giou of each pair", each, golden["giou_each"])
    gradient = jax.grad(lambda predicted: 10 * (1 - boxes.giou(predicted, target)).sum() / 64)(predicted)
    assert_close("giou loss", each.sum() / 64, golden["giou_loss_avg64_w10"], 1e-5)
    assert_close("giou gradient", gradient, golden["giou_grad"], 1e-3)


def test_empty_boxes_overlap_nothing():
    a = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 9.0]])
    np.testing.assert_array_equal(boxes.pairwise_iou(a, a), np.zeros((2, 2)))
    assert jnp.isfinite(boxes.giou(a, a)).all()
