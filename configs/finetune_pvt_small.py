"""PVT-S, fine-tuned for 100 epochs on ImageNet-1K after 200 of pre-training (the paper's setting; SPEC 10 to 12).

    python -m umae_jax.finetune --config finetune_pvt_small --workdir DIR --config.init=DIR_OR_FILE \
        --config.data.data_dir=TFDS_FOLDER

Published top-1: 79.31% after UM-MAE, 79.28% after SimMIM.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("pvt_small", "classifier")
    config.data.source = config.validation.source = "tfds:imagenet2012"
    return config
