"""A Swin of a billion parameters, UM-MAE, 800 epochs on ImageNet-1K; not in the paper.

    python -m umae_jax.pretrain --config pretrain_swin_billion --workdir DIR \
        --config.data.source=tfds:imagenet2012 --config.data.data_dir=TFDS_FOLDER

The recipe is Swin-L's. Parameters and optimiser state are sharded over 8 devices: together they take 11.3 GiB, and the
gradients 3.8 GiB.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_large", "um_mae")
    config.model.widths = (384, 768, 1536, 3072)
    config.model.depths = (2, 2, 25, 2)
    config.model.heads = (12, 24, 48, 96)
    config.total_epochs = 800.0
    config.optimizer.warmup_epochs = 40.0
    config.data.source = "tfds:imagenet2012"
    config.mesh.fsdp = 8
    return config
