"""Pre-training of the small Swin of `small_detection/detect`, on unlabelled images; minutes on two CPU cores.

    python -m umae_jax.pretrain --config small_detection/pretrain:um_mae --workdir DIR \
        --config.data.source=folder:FOLDER

The method, um_mae or simmim, follows the colon. `configs/small_detection/experiment.py` compares them.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config(method: str = "um_mae") -> ConfigDict:
    config = default_config("swin_tiny", method)
    config.image_size = (128, 128)
    config.batch_size = 32
    config.dtype = "float32"
    config.total_epochs = None
    config.total_steps = 1500

    config.model.widths = (24, 48, 96, 192)
    config.model.depths = (1, 1, 2, 1)
    config.model.heads = (1, 2, 4, 8)
    config.model.window = 8
    config.model.position_width = 16
    if method == "um_mae":
        config.model.decoder_width = 96
        config.model.decoder_depth = 1
        config.model.decoder_heads = 4

    config.data.source = "folder:photographs"
    config.data.threads = 2
    config.data.workers = 0

    config.optimizer.base_learning_rate = 1.6e-2  # 2e-3 for 32 images
    config.optimizer.warmup_epochs = None
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0

    config.log_every = 20
    config.picture_every = 0
    config.checkpoint_keep = 1
    config.checkpoint_keep_every = 0
    return config
