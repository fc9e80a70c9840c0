"""Random samples of assigned boxes (DET 1.4, 1.8)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from umae_jax.detection.top_k import top_k


class Sample(NamedTuple):
    """Sampled rows of an array of boxes: positives, then negatives, each in ascending order, then unused slots."""

    index: jax.Array  # type: ignore[assignment]  # int32 [count]; 0 where not valid
    positive: jax.Array  # bool [count]
    valid: jax.Array  # bool [count]


def sample(key: jax.Array, gt_index: jax.Array, candidates: jax.Array, *, count: int, max_positive: int) -> Sample:
    """Draw positives, and negatives for the remaining slots, uniformly without replacement.

    Args:
        key: random key of the image.
        gt_index: `Assignment.gt_index`, int32 [N]: positive if > 0, negative if 0.
        candidates: rows to draw from, bool [N].
        count: slots of the sample.
        max_positive: max positives, at most `count`.
    """
    total = len(gt_index)
    # Each row gets a random rank. 31 bits make ties, which favour the lower row, rare.
    rank = (jax.random.bits(key, (total,), jnp.uint32) >> 1).astype(jnp.int32)

    def draw(eligible: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
        """Return the rows of best rank and whether they are eligible."""
        best, index = top_k(jnp.where(eligible, rank, -1), min(limit, total))
        return index, best >= 0

    positives, positive_valid = draw(candidates & (gt_index > 0), max_positive)
    negatives, negative_valid = draw(candidates & (gt_index == 0), count)
    remaining = count - positive_valid.sum(dtype=jnp.int32)
    negative_valid &= jnp.arange(len(negatives), dtype=jnp.int32) < remaining
    unused = 2 * total
    slots = jnp.concatenate(
        [
            jnp.where(positive_valid, positives, unused),
            jnp.where(negative_valid, total + negatives, unused),
            jnp.full(count, unused, jnp.int32),
        ]
    )
    slots = jnp.sort(slots)[:count]
    valid = slots < unused
    return Sample(jnp.where(valid, slots % max(total, 1), 0), slots < total, valid)


def sample_images(
    keys: jax.Array, gt_index: jax.Array, candidates: jax.Array, *, count: int, max_positive: int
) -> Sample:
    """Draw a sample of each image of a batch, with its own key; arguments of `sample`, [B, ...]."""
    return jax.vmap(partial(sample, count=count, max_positive=max_positive))(keys, gt_index, candidates)
