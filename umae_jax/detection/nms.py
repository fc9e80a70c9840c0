"""Non-maximum suppression, hard and soft, and the choice of final detections (DET 1.4, 1.11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from umae_jax.detection.boxes import pairwise_iou

CLASSES_AT_A_TIME = 16  # a matrix of N x N flags each


class Detections(NamedTuple):
    """Boxes of an image in the order of their scores, then unused slots, which hold zeros."""

    boxes: jax.Array  # float32 [count, 4]
    scores: jax.Array  # float32 [count], decayed by soft-NMS
    labels: jax.Array  # int32 [count]
    index: jax.Array  # type: ignore[assignment]  # int32 [count], rows of the boxes that were given
    valid: jax.Array  # bool [count]


def nms(boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
    """Return the boxes that remain after non-maximum suppression.

    Of two boxes with equal scores, the lower row counts as the better one.

    Args:
        boxes: float32 [N, 4].
        scores: float32 [N].
        valid: boxes to consider, bool [N].
        threshold: a kept box suppresses worse ones of a larger IoU.

    Returns:
        bool [N].
    """
    return _keep(pairwise_iou(boxes, boxes) > threshold, scores, valid)


def nms_per_class(
    boxes: jax.Array, scores: jax.Array, labels: jax.Array, valid: jax.Array, threshold: float
) -> jax.Array:
    """Return the boxes that remain after `nms` among those of each label, int32 [N]: bool [N]."""
    overlapping = pairwise_iou(boxes, boxes) > threshold
    return _keep(overlapping & (labels[:, None] == labels[None]), scores, valid)


def soft_nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    method: str,
    threshold: float,
    sigma: float,
    min_score: float,
    count: int,
) -> Detections:
    """Pick the best box `count` times; each time, decay the scores of the others of its label.

    Args:
        boxes: float32 [N, 4].
        scores: float32 [N].
        labels: int32 [N].
        valid: boxes to consider, bool [N].
        method: "linear" multiplies by 1 - IoU from the threshold on, "gaussian" by exp(-IoU^2 / sigma).
        threshold: min IoU that decays; not of "gaussian".
        sigma: width of "gaussian".
        min_score: candidates below this score, before or after decay, are dropped.
        count: slots of the result. The picks do not depend on it.
    """
    return _soft_nms(
        boxes, scores[:, None], labels[:, None], valid[:, None], method, threshold, sigma, min_score, count
    )


def select_detections(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    *,
    score_threshold: float,
    threshold: float,
    count: int,
    method: str,
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> Detections:
    """Return the best detections among all pairs of boxes and classes after suppression in each class (DET 1.11).

    Args:
        boxes: float32 [N, 4], the same for all classes.
        scores: float32 [N, classes].
        valid: bool [N].
        score_threshold: only pairs of a larger score count.
        threshold: IoU of `nms` or `soft_nms`.
        count: max detections.
        method: "hard", "linear" or "gaussian".
        sigma: width of "gaussian".
        min_score: score at which soft-NMS ends.
    """
    labels = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32)[None], scores.shape)
    candidates = valid[:, None] & (scores > score_threshold)
    if method != "hard":
        return _soft_nms(boxes, scores, labels, candidates, method, threshold, sigma, min_score, count)
    # The overlaps are those of all classes; only the order of the boxes differs. So no candidate needs to be left out.
    overlapping = pairwise_iou(boxes, boxes) > threshold
    columns = (scores.T, candidates.T)
    kept = lax.map(lambda column: _keep(overlapping, *column), columns, batch_size=CLASSES_AT_A_TIME).T
    pairs = jnp.where(kept, scores, -jnp.inf).reshape(-1)
    best, flat_index = lax.top_k(jnp.pad(pairs, (0, max(count - pairs.size, 0)), constant_values=-jnp.inf), count)
    return _detections(boxes, labels, best, flat_index, best > -jnp.inf)


def _keep(overlapping: jax.Array, scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Suppress by scores [N], given bool [N, N]: the overlaps that suppress the worse box of a pair."""
    row = jnp.arange(len(scores), dtype=jnp.int32)
    better = (scores[:, None] > scores[None]) | ((scores[:, None] == scores[None]) & (row[:, None] < row[None]))
    suppressing = overlapping & better

    def suppress(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept = state[0]
        return valid & ~(suppressing & kept[:, None]).any(0), kept

    # After k rounds at least the k best boxes are decided, so that the first unchanged round equals the greedy loop.
    return lax.while_loop(lambda state: (state[0] != state[1]).any(), suppress, (valid, jnp.zeros_like(valid)))[0]


def _soft_nms(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    method: str,
    threshold: float,
    sigma: float,
    min_score: float,
    count: int,
) -> Detections:
    """Run `soft_nms` on M candidates of each box: scores, labels and valid are [N, M]."""

    def pick(remaining: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        flat_index = remaining.argmax().astype(jnp.int32)
        best = remaining.reshape(-1)[flat_index]
        iou = pairwise_iou(boxes, boxes[flat_index // labels.shape[1]][None])
        if method == "linear":
            decay = jnp.where(iou >= threshold, 1 - iou, 1)
        else:
            decay = jnp.exp(-(iou**2) / sigma)
        remaining = jnp.where(labels == labels.reshape(-1)[flat_index], remaining * decay, remaining)
        remaining = jnp.where(remaining >= min_score, remaining, -jnp.inf)
        return remaining.reshape(-1).at[flat_index].set(-jnp.inf).reshape(scores.shape), (best, flat_index)

    remaining = jnp.where(valid & (scores >= min_score), scores, -jnp.inf)
    _, (best, flat_index) = lax.scan(pick, remaining, None, length=count)
    return _detections(boxes, labels, best, flat_index, best > -jnp.inf)


def _detections(
    boxes: jax.Array, labels: jax.Array, scores: jax.Array, flat_index: jax.Array, valid: jax.Array
) -> Detections:
    """Gather detections by their position in the flattened labels, [N, M]."""
    flat_index = jnp.where(valid, flat_index, 0)
    index = flat_index // labels.shape[1]
    return Detections(
        boxes=jnp.where(valid[:, None], boxes[index], 0),
        scores=jnp.where(valid, scores, 0),
        labels=jnp.where(valid, labels.reshape(-1)[flat_index], 0),
        index=index,
        valid=valid,
    )
