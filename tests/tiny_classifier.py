"""A configuration that fine-tunes the model of `tests/tiny.py` in seconds: `--config tests/tiny_classifier.py`."""

from ml_collections import ConfigDict

from tests import tiny
from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "classifier")
    pretraining = tiny.get_config()
    for key in ("image_size", "batch_size", "dtype", "total_steps", "log_every", "checkpoint_every"):
        config[key] = pretraining[key]
    for key in ("widths", "depths", "heads", "mlp_ratios", "window", "position_width"):
        config.model[key] = pretraining.model[key]
    config.model.classes = None
    config.data.threads = 2
    config.optimizer.warmup_steps = 2
    config.optimizer.base_learning_rate = 5e-2
    return config
