"""Keys and recipe of object detection and instance segmentation (DET 1 to 3)."""

from typing import Any

from umae_jax.config.base import (
    BOOLEAN,
    MAX_ITEMS,
    METHODS,
    TEXT,
    Check,
    Key,
    Method,
    choice,
    integer,
    number,
    optional,
    sequence,
)
from umae_jax.config.common import MAX_WIDTH

_SIDE = integer(32, 16384)
_SIDES = sequence(_SIDE, (736, 1408))


def _range(item: Check, example: tuple[float, float]) -> Check:
    """Accept two numbers, the smaller first."""

    def accepts(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, tuple) and len(value) == 2 and all(map(item.accepts, value)) and value[0] <= value[1]

    return Check(tuple, f"a minimum and a maximum, such as {example}, each {item.wording}", accepts)


def _scales(item: Check) -> Check:
    """Accept any number of lengths, also none."""

    def accepts(value: Any) -> bool:  # noqa: ANN401
        return isinstance(value, tuple) and len(value) <= MAX_ITEMS and all(map(item.accepts, value))

    return Check(tuple, f"a tuple of up to {MAX_ITEMS}, such as (1000, 1200), each {item.wording}", accepts)


_KEYS = {
    "model.classes": Key(
        None, "number of classes; None: as many as the training data has", optional(integer(1, 2**16))
    ),
    "model.drop_path": Key(0.2, "drop path rate of the last block", number("[0, 1)")),
    "model.global_block": Key(True, "HTC++: a block of global attention after the last stage", BOOLEAN),
    "model.pyramid_width": Key(256, "channels of the feature pyramid and of all heads", integer(1, MAX_WIDTH)),
    "model.stages": Key(3, "stages of the cascade; 1: Faster or Mask R-CNN", integer(1, 3)),
    "model.masks": Key(None, "predict masks; None: if the training data has any", optional(BOOLEAN)),
    "model.interleaved": Key(True, "HTC: train each mask head on the boxes that its stage has refined", BOOLEAN),
    "model.mask_flow": Key(True, "HTC: hand the features of each mask head to the next", BOOLEAN),
    "model.semantic_classes": Key(
        0, "HTC: classes of the semantic branch, 183 for COCO-stuff; 0: no branch", integer(0, 254)
    ),
    "model.box_convs": Key(4, "convolutions with BatchNorm in each box head; 0: two linear layers", integer(0, 8)),
    "model.box_hidden": Key(1024, "width of the linear layers of the box heads", integer(1, MAX_WIDTH)),
    "model.box_loss": Key("giou", "loss of the boxes", choice("giou", "smooth_l1")),
    "model.anchor_scale": Key(8.0, "side of an anchor in strides; smaller for small objects", number("[1, 64]")),
    "model.rpn_samples": Key(256, "anchors per image in the RPN's loss", integer(2, 2**14)),
    "model.train_proposals": Key(2000, "proposals per level and per image in training", integer(1, 2**14)),
    "model.test_proposals": Key(1000, "proposals per level and per image in evaluation", integer(1, 2**14)),
    "model.roi_samples": Key(512, "RoIs per image in the loss of each stage", integer(4, 2**14)),
    "model.score_threshold": Key(0.001, "minimum score of a detection", number("[0, 1)")),
    "model.nms": Key("linear", "hard NMS, or linear or Gaussian soft-NMS", choice("hard", "linear", "gaussian")),
    "model.nms_threshold": Key(
        None, "IoU of NMS; None: 0.5 for hard NMS, 0.3 for linear soft-NMS", optional(number("(0, 1]"))
    ),
    "model.nms_sigma": Key(0.5, "sigma of Gaussian soft-NMS", number("(0, 100]")),
    "model.detections": Key(100, "maximum detections per image", integer(1, 1000)),
    "data.canvas_heights": Key(
        (736, 1088, 1408), "heights of the canvases of landscape images, ascending; one program for each", _SIDES
    ),
    "data.canvas_widths": Key((1120, 1600, 1600), "their widths; portrait images have them transposed", _SIDES),
    "data.short_edge": Key(
        (400, 1400), "range that an image's shorter edge is drawn from, in pixels", _range(_SIDE, (400, 1400))
    ),
    "data.semantic": Key(None, "folder of semantic maps, a PNG per image; 255 is ignored", optional(TEXT)),
    "augment.jitter": Key(
        None,
        "range of large-scale jitter, as a part of the canvas, such as (0.1, 2.0); None: off",
        optional(_range(number("[0.01, 10]"), (0.1, 2.0))),
    ),
    "augment.copy_paste": Key(0.5, "probability of Simple Copy-Paste per image; 0: off", number("[0, 1]")),
    "validation.scales": Key(
        (), "test-time augmentation: lengths of the shorter edge in further views; (): none", _scales(_SIDE)
    ),
    "validation.flip": Key(False, "test-time augmentation: also mirror each view", BOOLEAN),
    "validation.short_edge": Key(1400, "length that the shorter edge of images is resized to, in pixels", _SIDE),
    "optimizer.layer_decay": Key(1.0, "learning rate / the next layer's", number("(0, 1]")),
    "optimizer.decay_at": Key(
        (27 / 36, 33 / 36),
        "parts of the run after which the learning rate is divided by 10; None: cosine schedule",
        optional(sequence(number("(0, 1]"), (0.67, 0.92))),
    ),
}


# Cascade Mask R-CNN: what HTC++ adds, taken away, and the field's NMS.
CASCADE = {
    "model.global_block": False,
    "model.interleaved": False,
    "model.mask_flow": False,
    "model.score_threshold": 0.05,
    "model.nms": "hard",
}


def cascade_on_coco(epochs: str) -> dict[str, Any]:
    """Return the values of Cascade Mask R-CNN on COCO for a schedule of 12 or 36 epochs (DET 1.1)."""
    return {
        **CASCADE,
        "image_size": (800, 1344),
        "total_epochs": float(epochs),
        "model.classes": 80,
        "model.masks": True,
        "data.canvas_heights": (608, 800),
        "data.canvas_widths": (928, 1344),
        "data.short_edge": (480, 800),
        "augment.copy_paste": 0.0,
        "validation.short_edge": 800,
        "optimizer.decay_at": (8 / 12, 11 / 12) if epochs == "12" else (27 / 36, 33 / 36),
    }


def _recipe(size: str, encoder: str) -> dict[str, Any]:
    return {
        "image_size": (1408, 1600),  # the largest canvas
        "batch_size": 16,
        "total_epochs": 36.0,
        "picture_every": 0,
        "data.source": "coco:coco",
        "validation.split": "val",
        "optimizer.base_learning_rate": 1.6e-3,  # 1e-4 for 16 images
        "optimizer.beta2": 0.999,
        "optimizer.warmup_epochs": None,
        "optimizer.warmup_steps": 500,
    }


METHODS["detector"] = Method(
    summary="objects and their masks: Mask R-CNN, Cascade, HTC, HTC++",
    task="umae_jax.tasks.detection",
    model="umae_jax.detection.build",
    keys=_KEYS,
    recipe=_recipe,
)
