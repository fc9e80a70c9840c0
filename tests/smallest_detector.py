"""A configuration of the smallest detector, which compiles in seconds: `--config tests/smallest_detector.py`."""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("vit_small", "detector")
    config.image_size = (64, 64)
    config.batch_size = 8
    config.dtype = "float32"
    config.total_epochs = None
    config.total_steps = 3
    config.log_every = 1

    config.model.widths = (8,)
    config.model.depths = (1,)
    config.model.heads = (2,)
    config.model.mlp_ratios = (1,)
    config.model.drop_path = 0.0
    config.model.global_block = False
    config.model.pyramid_width = 8
    config.model.stages = 1
    config.model.masks = False
    config.model.box_convs = 1
    config.model.box_hidden = 8
    config.model.anchor_scale = 4.0
    config.model.rpn_samples = 8
    config.model.train_proposals = 8
    config.model.test_proposals = 32
    config.model.roi_samples = 8
    config.model.score_threshold = 0.0
    config.model.nms = "hard"
    config.model.detections = 16

    config.data.source = config.validation.source = "coco:annotated"
    config.data.canvas_heights = config.data.canvas_widths = (64,)
    config.data.short_edge = (48, 64)
    config.data.threads = 1
    config.validation.short_edge = 64

    config.optimizer.base_learning_rate = 0.32  # 1e-2 for 8 images
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 1.0
    config.augment.copy_paste = 0.0
    return config
