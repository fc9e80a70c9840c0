"""Swin-T, SimMIM, 200 epochs on ImageNet-1K (the paper's baseline; SPEC 7, 10 to 12).

    python -m umae_jax.pretrain --config pretrain_swin_tiny_simmim --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

Published: 49.3 hours on 8 GPUs (UM-MAE: 25.0); 82.20% top-1 after 100 epochs of fine-tuning.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "simmim")
    config.data.source = "tfds:imagenet2012"
    return config
