"""The cascade of RoI heads (DET 1.6 to 1.11).

One stage is Faster or Mask R-CNN, three are Cascade Mask R-CNN. Interleaved execution, mask information flow and the
semantic branch make three stages HTC. Box heads of convolutions with BatchNorm, and the GIoU loss, make it HTC++.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection import box_head, mask_head, sampling
from umae_jax.detection.assignment import assign
from umae_jax.detection.box_head import BoxHead
from umae_jax.detection.boxes import decode, encode, giou
from umae_jax.detection.fpn import STRIDES
from umae_jax.detection.losses import smooth_l1
from umae_jax.detection.mask_head import MASK_SIDE, MaskHead
from umae_jax.detection.masks import mask_targets
from umae_jax.detection.nms import Detections, select_detections
from umae_jax.detection.roi_align import roi_align, roi_levels
from umae_jax.detection.rpn import Proposals
from umae_jax.detection.sampling import Sample
from umae_jax.detection.semantic_head import STRIDE as SEMANTIC_STRIDE
from umae_jax.detection.semantic_head import SemanticHead, semantic_loss
from umae_jax.detection.targets import Targets

GIOU_WEIGHT = 10.0
_roi_align = jax.jit(roi_align, static_argnames=("size", "strides"))  # traced once for all stages


class StageRule(NamedTuple):
    """Numbers of one stage of the cascade."""

    threshold: float  # IoU with an object from which on a box is positive
    std: tuple[float, float, float, float]  # of the box deltas
    weight: float  # of the losses


RULES = (
    StageRule(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    StageRule(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    StageRule(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


class CascadeOptions(NamedTuple):
    """Parts and numbers of the cascade.

    Attributes:
        stages: 1 to 3.
        masks: predict masks.
        interleaved: train each mask head on the boxes that its stage has refined; also, an object's best box is
            positive below the threshold, as in HTC.
        mask_flow: hand the features of each mask head to the next.
        semantic_classes: things and stuff of the semantic branch; 0: no branch.
        box_convs: 3 x 3 convolutions with BatchNorm in each box head; 0: two linear layers.
        box_hidden: width of the linear layers of the box heads.
        box_loss: "smooth_l1" of deltas or "giou" of boxes.
        samples: RoIs per image in the loss, at most a quarter of them positive.
        score_threshold: minimum score of a detection.
        nms: "hard", or "linear" or "gaussian" for soft-NMS.
        nms_threshold: IoU above which hard NMS drops a box, and from which on linear soft-NMS decays it.
        nms_sigma: of Gaussian soft-NMS.
        detections: maximum per image.
    """

    stages: int = 3
    masks: bool = True
    interleaved: bool = True
    mask_flow: bool = True
    semantic_classes: int = 183
    box_convs: int = 4
    box_hidden: int = 1024
    box_loss: str = "giou"
    samples: int = 512
    score_threshold: float = 0.001
    nms: str = "linear"
    nms_threshold: float = 0.3
    nms_sigma: float = 0.5
    detections: int = 100


class Features(NamedTuple):
    """The maps that RoI features come from."""

    pyramid: Sequence[jax.Array]  # P2 to P6
    semantic: jax.Array | None  # [B, H / 8, W / 8, width] of the semantic branch


class _Rois(NamedTuple):
    """Sampled RoIs of a batch, S per image: first the positive ones."""

    boxes: jax.Array  # float32 [B, S, 4]
    positive: jax.Array  # bool [B, S]
    valid: jax.Array  # bool [B, S]
    is_object: jax.Array  # bool [B, S], the RoI is the box of an object itself
    object_index: jax.Array  # int32 [B, S], the object of a positive RoI


class RoiHeads(nnx.Module):
    """Box heads and mask heads of all stages, and the semantic branch."""

    def __init__(self, width: int, classes: int, options: CascadeOptions, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.classes, self.options = classes, options
        shared: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        stages = range(options.stages)
        self.box_heads = nnx.List(
            BoxHead(width, options.box_hidden, classes, convs=options.box_convs, **shared) for _ in stages
        )
        self.mask_heads = nnx.List(
            MaskHead(width, classes, takes_previous=options.mask_flow and stage > 0, **shared)
            for stage in (stages if options.masks else ())
        )
        semantic = options.semantic_classes
        self.semantic_head = SemanticHead(width, semantic, len(STRIDES), **shared) if semantic else None

    # Training.

    def losses(
        self,
        pyramid: Sequence[jax.Array],
        proposals: Proposals,
        targets: Targets,
        image_size: jax.Array,
        keys: jax.Array,
    ) -> dict[str, jax.Array]:
        """Return the losses of all stages, weighted, and the accuracy of each box head.

        Args:
            pyramid: P2 to P6.
            proposals: of the RPN.
            targets: of the batch.
            image_size: int32 [B, 2], height and width of the content.
            keys: [B], random keys of the samples.
        """
        losses: dict[str, jax.Array] = {}
        semantic = None
        if self.semantic_head is not None:
            with jax.named_scope("semantic"):
                logits, semantic = self.semantic_head(pyramid)
                assert targets.semantic is not None
                losses["semantic"] = semantic_loss(logits, targets.semantic)
        features = Features(pyramid, semantic)
        boxes, valid = proposals.boxes, proposals.valid
        for stage, head in enumerate(self.box_heads):
            rule = RULES[stage]
            stage_keys = jax.vmap(lambda key, stage=stage: jax.random.split(jax.random.fold_in(key, stage)))(keys)
            rois = self._draw(boxes, valid, targets, rule, stage_keys[:, 0])
            with jax.named_scope("box_head"):
                logits, deltas = self._predict_boxes(head, features, rois.boxes, rois.valid, train=True)
                for name, value in self._box_losses(rois, logits, deltas, targets, rule).items():
                    losses[f"stage_{stage}_{name}"] = value
                refined = _decode(rois.boxes, jax.lax.stop_gradient(deltas), rule, image_size)
                boxes, valid = refined, rois.valid & ~(rois.positive & rois.is_object)
            if self.mask_heads:
                with jax.named_scope("mask_head"):
                    if self.options.interleaved:
                        rois = self._draw(boxes, valid, targets, rule, stage_keys[:, 1])
                    losses[f"stage_{stage}_mask"] = rule.weight * self._mask_loss(stage, features, rois, targets)
        return losses

    def _draw(self, boxes: jax.Array, valid: jax.Array, targets: Targets, rule: StageRule, keys: jax.Array) -> _Rois:
        """Assign boxes and the objects' own boxes to objects, and sample them."""
        boxes = jnp.concatenate([targets.boxes, boxes], 1)  # [B, G + P, 4]
        valid = jnp.concatenate([targets.valid, valid], 1)
        objects = targets.boxes.shape[1]

        def assign_image(boxes: jax.Array, gts: jax.Array, gt_valid: jax.Array) -> jax.Array:
            own = jnp.where(gt_valid, jnp.arange(objects) + 1, 0)  # the boxes of objects are their own
            found = assign(
                *(boxes[objects:], gts, gt_valid),
                positive=rule.threshold,
                negative=rule.threshold,
                low_quality=self.options.interleaved,
                min_positive=rule.threshold,
            )
            return jnp.concatenate([own, found.gt_index])

        masked = jnp.where(valid[..., None], boxes, 0)  # invalid boxes overlap with nothing
        gt_index = jax.vmap(assign_image)(masked, targets.boxes, targets.valid)
        count = self.options.samples
        chosen: Sample = sampling.sample_images(keys, gt_index, valid, count=count, max_positive=count // 4)
        return _Rois(
            jnp.take_along_axis(boxes, chosen.index[..., None], 1),
            chosen.positive & chosen.valid,
            chosen.valid,
            chosen.index < objects,
            jnp.maximum(jnp.take_along_axis(gt_index, chosen.index, 1) - 1, 0),
        )

    def _box_losses(
        self, rois: _Rois, logits: jax.Array, deltas: jax.Array, targets: Targets, rule: StageRule
    ) -> dict[str, jax.Array]:
        """Return the class and box loss of a stage, weighted, and its accuracy as a fraction."""
        labels = jnp.take_along_axis(targets.labels, rois.object_index, 1)
        labels = jnp.where(rois.positive, labels, self.classes)
        valid = rois.valid.astype(jnp.float32)
        count = jnp.maximum(valid.sum(), 1)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        gts = jnp.take_along_axis(targets.boxes, rois.object_index[..., None], 1)
        if self.options.box_loss == "giou":
            boxes = decode(rois.boxes, deltas, rule.std)
            safe = jnp.where(rois.positive[..., None], gts, boxes)  # no NaN from the others
            errors = GIOU_WEIGHT * (1 - giou(boxes, safe))
        else:
            errors = smooth_l1(deltas - encode(rois.boxes, gts, rule.std), 1.0).sum(-1)
        return {
            "class": rule.weight * (valid * cross_entropy).sum() / count,
            "box": rule.weight * jnp.where(rois.positive, errors, 0).sum() / count,
            "accuracy": (rois.valid & (logits.argmax(-1) == labels)).sum().astype(jnp.float32) / count,
        }

    def _mask_loss(self, stage: int, features: Features, rois: _Rois, targets: Targets) -> jax.Array:
        """Return the binary cross-entropy of the masks of positive RoIs, each in the channel of its class."""
        slots = self.options.samples // 4  # the positive RoIs come first
        boxes, positive, index = (array[:, :slots] for array in (rois.boxes, rois.positive, rois.object_index))
        positive &= jnp.take_along_axis(targets.mask_valid, index, 1)
        logits = self._predict_masks(self._roi_features(features, boxes, mask_head.SIDE), stage)
        labels = jnp.take_along_axis(targets.labels, index, 1)
        logits = jnp.take_along_axis(logits, labels[:, :, None, None, None], -1)[..., 0]
        loss = optax.sigmoid_binary_cross_entropy(logits, target_masks(targets, index, boxes)).mean((2, 3))
        return jnp.where(positive, loss, 0).sum() / jnp.maximum(positive.sum(), 1).astype(jnp.float32)

    # Both.

    def _roi_features(self, features: Features, boxes: jax.Array, side: int) -> jax.Array:
        """Return the features of RoIs [B, R, 4], [B, R, side, side, width]; the semantic ones are added."""
        with jax.named_scope("roi_align"):
            x = _roi_align(features.pyramid[:4], boxes, roi_levels(boxes), size=side, strides=STRIDES[:4])
            if features.semantic is None:
                return x
            levels = jnp.zeros(boxes.shape[:2], jnp.int32)
            semantic = _roi_align((features.semantic,), boxes, levels, size=mask_head.SIDE, strides=(SEMANTIC_STRIDE,))
            if side != mask_head.SIDE:
                semantic = semantic.reshape(*semantic.shape[:2], side, 2, side, 2, -1).mean((3, 5))
            return x + semantic

    def _predict_boxes(
        self, head: BoxHead, features: Features, boxes: jax.Array, valid: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits [B, R, classes + 1] and deltas [B, R, 4] of RoIs."""
        x = self._roi_features(features, boxes, box_head.SIDE)
        logits, deltas = head(x.reshape(-1, *x.shape[2:]), valid.reshape(-1), train=train)
        return logits.reshape(*boxes.shape[:2], -1), deltas.reshape(boxes.shape)

    def _predict_masks(self, features: jax.Array, stage: int) -> jax.Array:
        """Return the mask logits of RoIs by one stage, float32 [B, R, side, side, classes].

        With mask flow the features of the RoIs, [B, R, SIDE, SIDE, width], pass through the heads of all stages before.
        """
        x = features.reshape(-1, *features.shape[2:])
        previous = None
        if self.options.mask_flow:
            for head in self.mask_heads[:stage]:
                previous = head.features(x, previous)
        head = self.mask_heads[stage]
        logits = head.predict(head.features(x, previous))
        return logits.reshape(*features.shape[:2], *logits.shape[1:])

    # Inference.

    def detect(
        self, pyramid: Sequence[jax.Array], proposals: Proposals, image_size: jax.Array
    ) -> tuple[Detections, jax.Array | None]:
        """Return the detections of each image, and their masks.

        Args:
            pyramid: P2 to P6.
            proposals: of the RPN.
            image_size: int32 [B, 2], height and width of the content.

        Returns:
            Detections in pixels of the resized image, and probabilities float32 [B, D, MASK_SIDE, MASK_SIDE] of the
            pixels of each box, None without masks.
        """
        features = self.features(pyramid)
        boxes, logits = self.refine(features, proposals, image_size)
        detections = self.select(boxes, jax.nn.softmax(logits), proposals.valid)
        return detections, self.segment(features, detections.boxes, detections.labels) if self.mask_heads else None

    def select(self, boxes: jax.Array, scores: jax.Array, valid: jax.Array) -> Detections:
        """Return the detections of each image after NMS per class.

        Args:
            boxes: float32 [B, P, 4].
            scores: probabilities, the background last, float32 [B, P, classes + 1].
            valid: bool [B, P].
        """
        options = self.options

        def select_image(boxes: jax.Array, scores: jax.Array, valid: jax.Array) -> Detections:
            return select_detections(
                *(boxes, scores, valid),
                score_threshold=options.score_threshold,
                threshold=options.nms_threshold,
                sigma=options.nms_sigma,
                count=options.detections,
                method=options.nms,
            )

        with jax.named_scope("nms"):
            return jax.vmap(select_image)(boxes, scores[..., :-1], valid)

    def features(self, pyramid: Sequence[jax.Array]) -> Features:
        """Return the maps that RoI features come from."""
        return Features(pyramid, None if self.semantic_head is None else self.semantic_head(pyramid)[1])

    def refine(self, features: Features, proposals: Proposals, image_size: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the boxes of the last stage [B, P, 4], and the mean of all stages' logits [B, P, classes + 1]."""
        boxes, total = proposals.boxes, jnp.zeros(())
        for rule, head in zip(RULES, self.box_heads, strict=False):
            logits, deltas = self._predict_boxes(head, features, boxes, proposals.valid, train=False)
            boxes = _decode(boxes, deltas, rule, image_size)
            total = total + logits
        return boxes, total / len(self.box_heads)

    def segment(self, features: Features, boxes: jax.Array, labels: jax.Array) -> jax.Array:
        """Return mask probabilities within boxes, [B, D, side, side]: the mean over stages (DET 1.11)."""
        x = self._roi_features(features, boxes, mask_head.SIDE)
        stages = [jax.nn.sigmoid(self._predict_masks(x, stage)) for stage in range(len(self.mask_heads))]
        mean = sum(stages[1:], start=stages[0]) / len(stages)
        return jnp.take_along_axis(mean, labels[:, :, None, None, None], -1)[..., 0]


def target_masks(targets: Targets, index: jax.Array, boxes: jax.Array) -> jax.Array:
    """Return the masks of objects within boxes, 0 or 1, float32 [B, R, MASK_SIDE, MASK_SIDE].

    Args:
        targets: of the batch.
        index: int32 [B, R], object of each box.
        boxes: float32 [B, R, 4].
    """

    def of_image(masks: jax.Array, gts: jax.Array, index: jax.Array, boxes: jax.Array) -> jax.Array:
        return mask_targets(masks[index], gts[index], boxes, MASK_SIDE)

    return jax.vmap(of_image)(targets.masks, targets.boxes, index, boxes)


def _decode(boxes: jax.Array, deltas: jax.Array, rule: StageRule, image_size: jax.Array) -> jax.Array:
    """Refine boxes [B, R, 4], and clip them to their images."""

    def of_image(boxes: jax.Array, deltas: jax.Array, size: jax.Array) -> jax.Array:
        return decode(boxes, deltas, rule.std, size)

    return jax.vmap(of_image)(boxes, deltas, image_size)
