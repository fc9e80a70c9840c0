"""Build a detector from a configuration."""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.detection.cascade import CascadeOptions
from umae_jax.detection.detector import Detector
from umae_jax.detection.rpn import RpnOptions
from umae_jax.errors import require
from umae_jax.models.build import build_pyramid

NMS_THRESHOLDS = {"hard": 0.5, "linear": 0.3}  # of IoU


def build_model(config: ConfigDict, rngs: nnx.Rngs) -> Detector:
    """Build the detector of a configuration, freshly initialised; a UserError names sizes that do not fit together."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    require(model.classes is not None, "model.classes: write the number of classes")
    require(model.masks is not None, "model.masks: write True, or False for boxes only")
    shared = ("score_threshold", "nms", "nms_sigma", "detections")
    parts = ("stages", "masks", "interleaved", "mask_flow", "semantic_classes", "box_convs", "box_hidden", "box_loss")
    return Detector(
        build_pyramid(config, dtype, rngs),
        model.classes,
        width=model.pyramid_width,
        rpn=RpnOptions(model.anchor_scale, model.rpn_samples, model.train_proposals, model.test_proposals),
        cascade=CascadeOptions(
            samples=model.roi_samples,
            nms_threshold=model.nms_threshold or NMS_THRESHOLDS.get(model.nms, 0.0),
            **{key: model[key] for key in (*parts, *shared)},
        ),
        dtype=dtype,
        rngs=rngs,
    )
