"""Cascade Mask R-CNN with PVT-S on COCO, boxes and masks, 36 epochs (3x).

    python -m umae_jax.detect --config detect_cascade_pvt_small --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

FOLDER has COCO's layout. `--config detect_cascade_pvt_small:12` trains 12 epochs (1x). Neither AP nor hours have been
published for this detector with PVT-S.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config
from umae_jax.config.detection import cascade_on_coco


def get_config(epochs: str = "36") -> ConfigDict:
    config = default_config("pvt_small", "detector")
    config.update_from_flattened_dict(cascade_on_coco(epochs))
    config.model.drop_path = 0.1
    return config
