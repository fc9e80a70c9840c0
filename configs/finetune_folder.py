"""Swin-T classifier for a folder of your own images, on one GPU, after pretrain_folder.

    python -m umae_jax.finetune --config finetune_folder --workdir DIR --config.init=DIR_OR_FILE \
        --config.data.source=folder:TRAIN --config.validation.source=folder:VALIDATION

Each folder has one subfolder per class. There is no published result to compare with.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "classifier")
    config.image_size = (128, 128)
    config.batch_size = 128
    config.model.classes = None  # as many as there are subfolders
    config.data.source = "folder:images/train"
    config.data.threads = 4
    config.validation.source = "folder:images/validation"
    config.optimizer.clip_norm = 1.0
    config.log_every = 10
    config.checkpoint_keep_every = 0
    return config
