"""ViT-B, MAE with random sampling, 200 epochs on ImageNet-1K (the paper's setting; SPEC 5, 10 to 12).

    python -m umae_jax.pretrain --config pretrain_vit_base_mae --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

Published: 82.88% top-1 after 100 epochs of fine-tuning, as with uniform sampling. The paper reports no training time.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("vit_base", "mae")
    config.data.source = "tfds:imagenet2012"
    return config
