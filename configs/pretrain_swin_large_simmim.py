"""Swin-L, SimMIM, 800 epochs on ImageNet-1K (the paper's baseline; SPEC 7, 10 to 12).

    python -m umae_jax.pretrain --config pretrain_swin_large_simmim --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

Published: 85.4% top-1 after fine-tuning (UM-MAE: 85.2). The paper reports no training time.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_large", "simmim")
    config.total_epochs = 800.0
    config.optimizer.warmup_epochs = 40.0
    config.data.source = "tfds:imagenet2012"
    return config
