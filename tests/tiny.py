"""A configuration that trains in seconds: `--config tests/tiny.py`."""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = (32, 32)
    config.batch_size = 16
    config.dtype = "float32"
    config.total_steps = 12
    config.model.widths = (8, 16)
    config.model.depths = (1, 2)
    config.model.heads = (1, 2)
    config.model.mlp_ratios = (4, 4)
    config.model.window = 8
    config.model.position_width = 8
    config.model.decoder_width = 16
    config.model.decoder_depth = 1
    config.model.decoder_heads = 2
    config.data.threads = 2
    config.optimizer.base_learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.log_every = 1
    config.picture_every = 0
    config.checkpoint_every = 5
    config.pictures = 2
    return config
