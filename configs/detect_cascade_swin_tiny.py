"""Cascade Mask R-CNN with Swin-T on COCO, boxes and masks, 36 epochs (3x).

    python -m umae_jax.detect --config detect_cascade_swin_tiny --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

FOLDER has COCO's layout. `--config detect_cascade_swin_tiny:12` trains 12 epochs (1x). Published for the standard
Swin-T after labels of ImageNet-1K, 3x, with random crops, which are not here: 50.4 box AP, 43.7 mask AP. Neither AP
after UM-MAE nor hours have been published.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config
from umae_jax.config.detection import cascade_on_coco


def get_config(epochs: str = "36") -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    config.update_from_flattened_dict(cascade_on_coco(epochs))
    return config
