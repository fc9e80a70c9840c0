"""Cascade Mask R-CNN with PVT-S on COCO, boxes and masks, 36 epochs (3x).

    python -m umae_jax.detect --config detect_cascade_pvt_small --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

FOLDER has COCO's layout. `--config detect_cascade_pvt_small:12` trains 12 epochs (1x). Neither AP nor hours have been
published for this detector with PVT-S.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config(epochs: str = "36") -> ConfigDict:
    config = default_config("pvt_small", "detector")
    config.image_size = (800, 1344)
    config.total_epochs = float(epochs)
    config.model.drop_path = 0.1
    config.model.classes = 80
    config.model.masks = True
    config.model.global_block = False
    config.model.interleaved = False
    config.model.mask_flow = False
    config.model.score_threshold = 0.05
    config.model.nms = "hard"
    config.data.canvas_heights = (608, 800)
    config.data.canvas_widths = (928, 1344)
    config.data.short_edge = (480, 800)
    config.augment.copy_paste = 0.0
    config.validation.short_edge = 800
    config.optimizer.decay_at = (8 / 12, 11 / 12) if epochs == "12" else (27 / 36, 33 / 36)
    return config
