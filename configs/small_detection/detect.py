"""A small Faster R-CNN for blood cells or Mask R-CNN for nuclei; minutes on two CPU cores.

    python -m umae_jax.detect --config small_detection/detect:nuclei --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

The data, nuclei or cells, follow the colon. `configs/small_detection/experiment.py` compares ways to start.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config(data: str = "nuclei") -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    height, width = {"nuclei": (256, 256), "cells": (192, 256)}[data]
    config.image_size = (height, width)
    config.batch_size = 4
    config.dtype = "float32"
    config.total_epochs = {"nuclei": 20.0, "cells": 8.0}[data]

    config.model.widths = (24, 48, 96, 192)
    config.model.depths = (1, 1, 2, 1)
    config.model.heads = (1, 2, 4, 8)
    config.model.window = 8
    config.model.position_width = 16
    config.model.drop_path = 0.0
    config.model.global_block = False
    config.model.pyramid_width = 32
    config.model.stages = 1
    config.model.interleaved = False
    config.model.mask_flow = False
    config.model.box_convs = 0
    config.model.box_hidden = 128
    config.model.anchor_scale = {"nuclei": 3.0, "cells": 4.0}[data]
    config.model.rpn_samples = 128
    config.model.train_proposals = 256
    config.model.test_proposals = 256
    config.model.roi_samples = 64
    config.model.score_threshold = 0.01

    config.data.source = "coco:annotated"
    config.data.canvas_heights = (height,)
    config.data.canvas_widths = (width,)
    config.data.short_edge = (height * 3 // 4, height)
    config.data.threads = 2
    config.data.workers = 0
    config.augment.copy_paste = 0.0
    config.validation.source = "coco:annotated"
    config.validation.short_edge = height
    config.validation.every_epochs = config.total_epochs / 4

    config.optimizer.base_learning_rate = 0.064  # 1e-3 for 4 images
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_at = None
    config.optimizer.clip_norm = 10.0
    config.log_every = 20
    config.checkpoint_keep = 1
    config.checkpoint_keep_every = 0
    return config
