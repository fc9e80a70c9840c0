"""Assignment of boxes to ground truth by IoU (DET 1.4, 1.8)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from umae_jax.detection.boxes import pairwise_iou

MAX_PAIRS = 2**23  # IoUs in memory at a time: 32 MiB


class Assignment(NamedTuple):
    """The ground truth of each prior."""

    gt_index: jax.Array  # int32 [N]: -1 ignored, 0 background, k + 1 for gt k
    max_iou: jax.Array  # float32 [N], the best IoU with any valid gt; 0 without gts


@partial(jax.jit, static_argnames=("positive", "negative", "low_quality", "min_positive"))
def assign(
    priors: jax.Array,
    gts: jax.Array,
    gt_valid: jax.Array,
    *,
    positive: float,
    negative: float,
    low_quality: bool,
    min_positive: float,
) -> Assignment:
    """Assign each prior to the gt of max IoU, to the background or to neither.

    The priors of all levels must come in one array: the low-quality rule looks for the best prior of each gt.

    Args:
        priors: anchors or proposals, float32 [N, 4].
        gts: ground truth boxes, float32 [G, 4].
        gt_valid: bool [G].
        positive: min IoU of positives.
        negative: IoU below which a prior is background.
        low_quality: give each gt the priors that reach its max IoU, even if they fit another gt better. If a prior
            reaches that of several gts, the last gets it.
        min_positive: min IoU of that rule.
    """
    priors, gts = lax.stop_gradient((priors, gts))
    count, gt_count = len(priors), len(gts)
    block = min(max(MAX_PAIRS // max(count, 1), 1), gt_count)  # gts at a time
    padding = -gt_count % block
    gts = jnp.pad(gts, ((0, padding), (0, 0))).reshape(-1, block, 4)
    gt_valid = jnp.pad(gt_valid, (0, padding)).reshape(-1, block)
    numbers = 1 + jnp.arange(gt_count + padding, dtype=jnp.int32).reshape(-1, block)

    def add_gts(
        carry: tuple[jax.Array, jax.Array, jax.Array], group: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        max_iou, best, low = carry
        gts, valid, numbers = group
        # The barrier keeps XLA from computing an IoU twice with different rounding: the rule needs equality.
        iou = lax.optimization_barrier(jnp.where(valid[:, None], pairwise_iou(gts, priors), -1))
        block_max = iou.max(0)
        best = jnp.where(block_max > max_iou, numbers[iou.argmax(0)], best)
        if low_quality:
            gt_max = iou.max(1, keepdims=True)
            reached = (iou == gt_max) & (gt_max >= min_positive)
            low = jnp.maximum(low, jnp.where(reached, numbers[:, None], 0).max(0))
        return (jnp.maximum(max_iou, block_max), best, low), None

    none = jnp.zeros(count, jnp.int32)
    (max_iou, best, low), _ = lax.scan(add_gts, (jnp.zeros(count), none, none), (gts, gt_valid, numbers))
    gt_index = jnp.where(max_iou >= positive, best, jnp.where(max_iou < negative, 0, -1))
    return Assignment(jnp.where(low > 0, low, gt_index), max_iou)
