"""A small Swin for CIFAR-10's 32 x 32 images: 2-pixel patches, 4-pixel mask units, three stages; minutes on two cores.

    python -m umae_jax.pretrain --config cifar/pretrain:um_mae --workdir DIR \
        --config.data.source=folder:CIFAR/train

The method, um_mae or simmim, follows the colon. `configs/cifar/experiment.py` compares them.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config(method: str = "um_mae") -> ConfigDict:
    config = default_config("swin_tiny", method)
    config.image_size = (32, 32)
    config.batch_size = 256
    config.dtype = "float32"
    config.total_epochs = 10.0

    config.model.patch = 2
    config.model.widths = (32, 64, 128)
    config.model.depths = (1, 1, 2)
    config.model.heads = (1, 2, 4)
    config.model.mlp_ratios = (4, 4, 4)
    config.model.window = 8
    if method == "um_mae":
        config.model.decoder_width = 64
        config.model.decoder_depth = 1
        config.model.decoder_heads = 4

    config.data.source = "folder:cifar/train"
    config.data.area = 0.35
    config.data.threads = 2
    config.validation.every_epochs = 0.0

    config.optimizer.base_learning_rate = 2e-3
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.clip_norm = 1.0

    config.log_every = 50
    config.picture_every = 0
    config.checkpoint_every = 500
    config.checkpoint_keep = 1
    config.checkpoint_keep_every = 0
    return config
