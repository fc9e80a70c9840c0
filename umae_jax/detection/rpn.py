"""The region proposal network (DET 1.4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection import sampling
from umae_jax.detection.anchors import cells_inside, grid_anchors, inside
from umae_jax.detection.assignment import assign
from umae_jax.detection.boxes import decode, encode
from umae_jax.detection.fpn import STRIDES
from umae_jax.detection.layers import conv
from umae_jax.detection.losses import smooth_l1
from umae_jax.detection.nms import nms
from umae_jax.detection.targets import Targets
from umae_jax.detection.top_k import top_k

ANCHORS = 3  # per cell
STD = (1.0, 1.0, 1.0, 1.0)
NEGATIVE, POSITIVE = 0.3, 0.7  # IoU below which an anchor is negative, and from which on it is positive
NMS_THRESHOLD = 0.7
BETA = 1 / 9  # of the smooth L1 loss
PAD_MULTIPLE = 32  # anchors lie on the cells of the image, padded to a multiple of this


class RpnOptions(NamedTuple):
    """Numbers of the RPN."""

    anchor_scale: float = 8.0  # side of an anchor of aspect 1, in strides
    samples: int = 256  # anchors per image in the loss, at most half of them positive
    train_proposals: int = 2000  # per level before NMS, and per image after it
    test_proposals: int = 1000


class Proposals(NamedTuple):
    """Boxes that may hold objects, the best first."""

    boxes: jax.Array  # float32 [B, P, 4]
    scores: jax.Array  # float32 [B, P], probabilities
    valid: jax.Array  # bool [B, P]


class Rpn(nnx.Module):
    """Predicts the objectness and the box of every anchor; its weights are shared by all levels."""

    def __init__(self, width: int, options: RpnOptions, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.01)
        self.options = options
        self.conv = conv(width, width, 3, init=normal, dtype=dtype, rngs=rngs)
        self.objectness = conv(width, ANCHORS, 1, init=normal, dtype=dtype, rngs=rngs)
        self.deltas = conv(width, 4 * ANCHORS, 1, init=normal, dtype=dtype, rngs=rngs)

    def __call__(self, pyramid: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return logits [B, A] and deltas [B, A, 4] of the anchors of each level, in float32."""
        logits, deltas = [], []
        for level in pyramid:
            x = jax.nn.relu(self.conv(level))
            logits.append(self.objectness(x).astype(jnp.float32).reshape(x.shape[0], -1))
            deltas.append(self.deltas(x).astype(jnp.float32).reshape(x.shape[0], -1, 4))
        return logits, deltas

    def anchors(self, pyramid: Sequence[jax.Array]) -> list[np.ndarray]:
        """Return the anchors of each level, float32 [A, 4], in the order of the predictions."""
        scale = self.options.anchor_scale
        grids = [(level.shape[1], level.shape[2]) for level in pyramid]
        return [grid_anchors(grid, stride, scale) for grid, stride in zip(grids, STRIDES, strict=True)]

    def losses(
        self,
        pyramid: Sequence[jax.Array],
        logits: Sequence[jax.Array],
        deltas: Sequence[jax.Array],
        targets: Targets,
        image_size: jax.Array,
        keys: jax.Array,
    ) -> dict[str, jax.Array]:
        """Return the losses of sampled anchors; only anchors inside the image count.

        Args:
            pyramid: P2 to P6, for their sizes.
            logits, deltas: predictions for them.
            targets: of the batch.
            image_size: int32 [B, 2], height and width of the content.
            keys: [B], random keys of the samples.
        """
        levels = self.anchors(pyramid)
        anchors = jnp.asarray(np.concatenate(levels))

        def usable(size: jax.Array) -> jax.Array:
            """Return the anchors inside an image, bool [A]."""
            padded = -(-size // PAD_MULTIPLE) * PAD_MULTIPLE
            cells = [
                jnp.repeat(cells_inside((level.shape[1], level.shape[2]), stride, padded), ANCHORS)
                for level, stride in zip(pyramid, STRIDES, strict=True)
            ]
            return inside(anchors, size) & jnp.concatenate(cells)

        candidates = jax.vmap(usable)(image_size)

        def assign_image(boxes: jax.Array, valid: jax.Array, usable: jax.Array) -> jax.Array:
            outside = jnp.zeros_like(anchors)  # overlaps with nothing, so it is nobody's best anchor
            priors = jnp.where(usable[:, None], anchors, outside)
            found = assign(
                *(priors, boxes, valid), positive=POSITIVE, negative=NEGATIVE, low_quality=True, min_positive=NEGATIVE
            )
            return found.gt_index

        gt_index = jax.vmap(assign_image)(targets.boxes, targets.valid, candidates)
        count = self.options.samples
        with jax.named_scope("sampling"):
            chosen = sampling.sample_images(keys, gt_index, candidates, count=count, max_positive=count // 2)
        box_index = jnp.maximum(jnp.take_along_axis(gt_index, chosen.index, 1) - 1, 0)
        gts = jnp.take_along_axis(targets.boxes, box_index[..., None], 1)
        wanted = encode(anchors[chosen.index], gts, STD)
        positive = (chosen.positive & chosen.valid).astype(jnp.float32)  # [B, S]
        valid = chosen.valid.astype(jnp.float32)
        total = (jnp.maximum(positive.sum(1), 1) + jnp.maximum((valid - positive).sum(1), 1)).sum()
        logit = jnp.take_along_axis(jnp.concatenate(logits, 1), chosen.index, 1)
        delta = jnp.take_along_axis(jnp.concatenate(deltas, 1), chosen.index[..., None], 1)
        return {
            "rpn_class": (valid * optax.sigmoid_binary_cross_entropy(logit, positive)).sum() / total,
            "rpn_box": (positive[..., None] * smooth_l1(delta - wanted, BETA)).sum() / total,
        }

    def propose(
        self,
        pyramid: Sequence[jax.Array],
        logits: Sequence[jax.Array],
        deltas: Sequence[jax.Array],
        image_size: jax.Array,
        *,
        train: bool,
    ) -> Proposals:
        """Return the best boxes of each image after NMS per level; gradients stop here. Arguments as for `losses`."""
        count = self.options.train_proposals if train else self.options.test_proposals

        def best_of_level(
            anchors: jax.Array, logits: jax.Array, deltas: jax.Array, size: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """Return boxes [count, 4] of one level and image, and their logits [count], -inf for those to drop."""
            logits, index = top_k(logits, min(count, len(logits)))
            boxes = decode(anchors[index], deltas[index], STD, size)
            empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
            missing = count - len(logits)
            logits = jnp.pad(jnp.where(empty, -jnp.inf, logits), (0, missing), constant_values=-jnp.inf)
            return jnp.pad(boxes, ((0, missing), (0, 0))), logits

        def suppress(boxes: jax.Array, logits: jax.Array) -> jax.Array:
            return jnp.where(nms(boxes, logits, logits > -jnp.inf, NMS_THRESHOLD), logits, -jnp.inf)

        find = jax.vmap(best_of_level, (None, 0, 0, 0))
        levels = [
            find(jnp.asarray(anchors), level_logits, level_deltas, image_size)
            for anchors, level_logits, level_deltas in zip(self.anchors(pyramid), logits, deltas, strict=True)
        ]
        boxes, scores = (jnp.stack(arrays, 1) for arrays in zip(*levels, strict=True))  # [B, levels, count, ...]
        with jax.named_scope("nms"):
            merged = jax.vmap(jax.vmap(suppress))(boxes, scores).reshape(len(boxes), -1)
        best, index = jax.vmap(lambda scores: top_k(scores, min(count, len(scores))))(merged)
        chosen = jnp.take_along_axis(boxes.reshape(len(boxes), -1, 4), index[..., None], 1)
        valid = best > -jnp.inf
        proposals = Proposals(jnp.where(valid[..., None], chosen, 0), jax.nn.sigmoid(best), valid)
        return jax.tree.map(jax.lax.stop_gradient, proposals)
