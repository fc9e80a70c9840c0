"""Swin-L, UM-MAE 25% with secondary masking, 800 epochs on ImageNet-1K (the paper's setting; SPEC 10 to 12).

    python -m umae_jax.pretrain --config pretrain_swin_large --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

Published: 85.2% top-1 after fine-tuning (SimMIM: 85.4); box AP 57.4 and mask AP 49.8 with HTC++ on COCO minival. The
paper reports no training time.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_large", "um_mae")
    config.total_epochs = 800.0
    config.optimizer.warmup_epochs = 40.0
    config.data.source = "tfds:imagenet2012"
    return config
