"""Test-time augmentation: one image in several views, which differ in size and flip (DET 1.11)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from umae_jax.detection.detector import Detected, Detector
from umae_jax.detection.nms import nms
from umae_jax.detection.rpn import NMS_THRESHOLD, Proposals
from umae_jax.detection.top_k import top_k


class View(NamedTuple):
    """A batch of images in one size."""

    images: jax.Array  # uint8 [B, H, W, C]; the content lies in the upper left corner
    image_size: jax.Array  # int32 [B, 2], height and width of the content
    flip: bool = False  # whether to mirror the content left to right


def detect_in_views(model: Detector, views: list[View]) -> Detected:
    """Detect objects in several views of the same images.

    Every view refines the proposals of all of them. Boxes, scores and masks are averages over the views.

    Args:
        model: the detector.
        views: of the same images, in the same order.

    Returns:
        Detections in pixels of the first view, not flipped.
    """
    size = views[0].image_size
    pyramids, found = [], []
    for view in views:
        pyramids.append(model.pyramid(_mirror(view), view.image_size))
        proposals = model.rpn.propose(pyramids[-1], *model.rpn(pyramids[-1]), view.image_size, train=False)
        found.append(proposals._replace(boxes=_move(proposals.boxes, view, size, back=True)))
    proposals = _merge(found)
    features = [model.roi_heads.features(pyramid) for pyramid in pyramids]
    boxes, scores = jnp.zeros(()), jnp.zeros(())
    for view, maps in zip(views, features, strict=True):
        moved = proposals._replace(boxes=_move(proposals.boxes, view, size))
        refined, logits = model.roi_heads.refine(maps, moved, view.image_size)
        boxes = boxes + _move(refined, view, size, back=True) / len(views)
        scores = scores + jax.nn.softmax(logits) / len(views)
    detections = model.roi_heads.select(boxes, scores, proposals.valid)
    masks = None
    if model.roi_heads.mask_heads:
        parts = []
        for view, maps in zip(views, features, strict=True):
            own = model.roi_heads.segment(maps, _move(detections.boxes, view, size), detections.labels)
            parts.append(own[..., ::-1] if view.flip else own)
        masks = sum(parts[1:], start=parts[0]) / len(parts)
    return Detected(detections.boxes, detections.scores, detections.labels, detections.valid, masks)


def _mirror(view: View) -> jax.Array:
    """Return the images of a view, their content mirrored if the view is flipped."""
    if not view.flip:
        return view.images
    # The content of a mirrored canvas ends at the right border.
    width = view.images.shape[2]
    return jax.vmap(lambda image, size: jnp.roll(image, size[1] - width, axis=1))(
        view.images[:, :, ::-1], view.image_size
    )


def _move(boxes: jax.Array, view: View, size: jax.Array, *, back: bool = False) -> jax.Array:
    """Move boxes [B, R, 4] of content of a size, int32 [B, 2], into a view, or back out of it."""
    own, other = view.image_size.astype(jnp.float32), size.astype(jnp.float32)
    scale = jnp.tile((own / other)[:, ::-1], 2)[:, None]
    if back:
        return (_flip(boxes, own) if view.flip else boxes) / scale
    boxes = boxes * scale
    return _flip(boxes, own) if view.flip else boxes


def _flip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Mirror boxes [B, R, 4] in content of a size [B, 2]."""
    width = size[:, 1, None]
    return jnp.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1)


def _merge(found: list[Proposals]) -> Proposals:
    """Return the best proposals of all views after NMS, as many as one view has."""
    boxes, scores, valid = (jnp.concatenate(arrays, 1) for arrays in zip(*found, strict=True))
    count = found[0].boxes.shape[1]

    def of_image(boxes: jax.Array, scores: jax.Array, valid: jax.Array) -> Proposals:
        kept = jnp.where(nms(boxes, scores, valid, NMS_THRESHOLD), scores, -jnp.inf)
        best, index = top_k(kept, count)
        return Proposals(jnp.where((best > 0)[:, None], boxes[index], 0), jnp.maximum(best, 0), best > 0)

    return jax.vmap(of_image)(boxes, scores, valid)
