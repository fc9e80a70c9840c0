"""A small HTC without semantic branch for your own annotations: minutes on two CPU cores.

    python -m umae_jax.detect --config detect_tiny --workdir DIR --config.data.source=coco:FOLDER \
        --config.validation.source=coco:FOLDER

FOLDER is that of detect_folder. Training starts from scratch, or with --config.init from a pre-training of the same
sizes, for which docs/detection.md has the command. The recipe is ours: there are no published numbers.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    config.image_size = (256, 256)
    config.batch_size = 4
    config.dtype = "float32"
    config.total_epochs = 30.0

    config.model.widths = (24, 48, 96, 192)
    config.model.depths = (1, 1, 2, 1)
    config.model.heads = (1, 2, 4, 8)
    config.model.window = 8
    config.model.position_width = 16
    config.model.drop_path = 0.0
    config.model.global_block = False
    config.model.pyramid_width = 64
    config.model.box_convs = 0
    config.model.box_hidden = 128
    config.model.rpn_samples = 128
    config.model.train_proposals = 256
    config.model.test_proposals = 256
    config.model.roi_samples = 64
    config.model.score_threshold = 0.01

    config.data.source = "coco:annotated"
    config.data.canvas_heights = (256,)
    config.data.canvas_widths = (256,)
    config.data.short_edge = (160, 256)
    config.data.threads = 2
    config.augment.copy_paste = 0.0
    config.validation.short_edge = 256
    config.validation.every_epochs = 10.0

    config.optimizer.base_learning_rate = 0.064  # 1e-3 for 4 images
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 10.0
    config.log_every = 10
    return config
