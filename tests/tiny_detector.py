"""A configuration that trains HTC++ in seconds on `tests/annotated_images.py`: `--config tests/tiny_detector.py`."""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    config.image_size = (64, 96)
    config.batch_size = 8
    config.dtype = "float32"
    config.total_epochs = None
    config.total_steps = 24
    config.log_every = 1
    config.checkpoint_every = 5

    config.model.widths = (8, 16, 16, 16)
    config.model.depths = (1, 1, 1, 1)
    config.model.heads = (1, 2, 2, 2)
    config.model.window = 4
    config.model.position_width = 8
    config.model.drop_path = 0.1
    config.model.pyramid_width = 16
    config.model.stages = 2
    config.model.box_convs = 1
    config.model.box_hidden = 32
    config.model.anchor_scale = 4.0
    config.model.rpn_samples = 32
    config.model.train_proposals = 16
    config.model.test_proposals = 16
    config.model.roi_samples = 16
    config.model.score_threshold = 0.01
    config.model.detections = 8

    config.data.source = "coco:annotated"
    config.data.canvas_heights = (64,)
    config.data.canvas_widths = (96,)
    config.data.short_edge = (48, 64)
    config.data.threads = 2
    config.validation.source = "coco:annotated"
    config.validation.short_edge = 64
    config.validation.every_epochs = 3.0

    config.optimizer.base_learning_rate = 0.32  # 1e-2 for 8 images
    config.optimizer.warmup_steps = 2
    config.augment.copy_paste = 0.2
    config.optimizer.clip_norm = 10.0
    return config
