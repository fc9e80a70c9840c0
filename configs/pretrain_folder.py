"""Swin-T on a folder of your own images, on one GPU or in Colab.

    python -m umae_jax.pretrain --config pretrain_folder --workdir DIR --config.data.source=folder:PATH

The paper's model and masking at 128 x 128 pixels, for a few thousand to a few hundred thousand images: a batch that
fits on one GPU, many epochs, a higher learning rate for the smaller batch, and gradient clipping. There is no published
result to compare with; look at the pictures in DIR/reconstructions.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = (128, 128)
    config.batch_size = 256
    config.total_epochs = 400.0

    config.model.decoder_width = 256
    config.model.decoder_heads = 8

    config.data.source = "folder:images"
    config.data.threads = 4

    config.optimizer.base_learning_rate = 3e-4
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.clip_norm = 1.0

    config.log_every = 10
    config.checkpoint_keep_every = 0
    return config
