"""A small Swin on the bundled photographs: minutes on two CPU cores.

python -m umae_jax.pretrain --config quickstart --workdir runs/quickstart
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = (128, 128)
    config.batch_size = 16
    config.dtype = "float32"
    config.total_epochs = 850.0  # 797 steps over 15 photographs

    config.model.widths = (48, 96, 192)
    config.model.depths = (1, 1, 2)
    config.model.heads = (2, 4, 8)
    config.model.mlp_ratios = (4, 4, 4)
    config.model.decoder_width = 128
    config.model.decoder_heads = 4
    config.model.norm_pix_loss = False  # plain pixels: blurrier, but pictures need no statistics of the true units

    config.data.source = "photos"
    config.data.area = 0.5
    config.data.threads = 2

    config.optimizer.base_learning_rate = 3.2e-2
    config.optimizer.warmup_epochs = 50.0
    config.optimizer.clip_norm = 1.0

    config.log_every = 20
    config.picture_every = 200
    config.checkpoint_every = 200
    return config
