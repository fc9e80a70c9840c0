"""A classifier that starts from the weights of `configs/cifar/pretrain.py`, or from scratch if init is not set.

    python -m umae_jax.finetune --config cifar/finetune --workdir DIR --config.init=DIR_OR_FILE \
        --config.data.source=folder:CIFAR/train --config.validation.source=folder:CIFAR/test
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "classifier")
    config.image_size = (32, 32)
    config.batch_size = 128
    config.dtype = "float32"
    config.total_epochs = 30.0

    config.model.patch = 2
    config.model.widths = (32, 64, 128)
    config.model.depths = (1, 1, 2)
    config.model.heads = (1, 2, 4)
    config.model.mlp_ratios = (4, 4, 4)
    config.model.window = 8
    config.model.classes = 10
    config.model.drop_path = 0.0  # this model is too small to need it

    config.data.source = "folder:cifar/train"
    config.data.area = 0.35
    config.data.threads = 2
    config.validation.source = "folder:cifar/test"
    config.validation.every_epochs = 5.0
    # Weaker than ImageNet's recipe: there are few images and few epochs.
    config.augment.operations = 1
    config.augment.erase = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0

    config.optimizer.base_learning_rate = 4e-3
    config.optimizer.warmup_epochs = 3.0
    config.optimizer.clip_norm = 1.0

    config.log_every = 50
    config.checkpoint_every = 500
    config.checkpoint_keep = 1
    config.checkpoint_keep_every = 0
    return config
