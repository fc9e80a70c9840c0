"""A classifier that starts from the quickstart's weights: minutes on two CPU cores.

    python -m umae_jax.finetune --config finetune_quickstart --workdir DIR --config.init=runs/quickstart \
        --config.data.source=folder:TRAIN --config.validation.source=folder:VALIDATION

Each folder has one subfolder per class; launch/colab.ipynb makes two from the photographs.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "classifier")
    config.image_size = (128, 128)
    config.batch_size = 32
    config.dtype = "float32"
    config.total_epochs = 6.0

    config.model.widths = (48, 96, 192)
    config.model.depths = (1, 1, 2)
    config.model.heads = (2, 4, 8)
    config.model.mlp_ratios = (4, 4, 4)
    config.model.classes = None  # as many as there are subfolders
    config.model.drop_path = 0.0

    config.data.source = "folder:images/train"
    config.data.area = 0.5
    config.data.threads = 2
    config.validation.source = "folder:images/validation"
    config.validation.every_epochs = 2.0

    # Strong augmentation helps only in long runs.
    config.augment.update(operations=0, erase=0.0, mixup=0.0, cutmix=0.0)
    config.optimizer.base_learning_rate = 8e-3
    config.optimizer.layer_decay = 0.9
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.clip_norm = 1.0

    config.log_every = 10
    config.checkpoint_every = 200
    return config
