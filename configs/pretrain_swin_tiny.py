"""Swin-T, UM-MAE 25% with secondary masking, 200 epochs on ImageNet-1K (the paper's setting; SPEC 10 to 12).

    python -m umae_jax.pretrain --config pretrain_swin_tiny --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

Published: 25.0 hours on 8 GPUs (SimMIM: 49.3); 82.04% top-1 after 100 epochs of fine-tuning.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "um_mae")
    config.data.source = "tfds:imagenet2012"
    return config
