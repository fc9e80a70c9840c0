"""Cascade Mask R-CNN with Swin-T for your own annotations, on one GPU or in Colab.

    python -m umae_jax.detect --config detect_folder --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER

FOLDER holds images/, annotations_train.json and annotations_val.json, or has COCO's layout; or write
coco:ANNOTATIONS.json@IMAGES. `python -m umae_jax.inspect_data --source coco:FOLDER` shows what it holds. PRETRAINED is
a run of pretrain_folder; without init, training starts from scratch. The recipe is ours: there are no published
numbers.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config
from umae_jax.config.detection import CASCADE


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    config.update_from_flattened_dict(CASCADE)
    config.image_size = (640, 640)
    config.batch_size = 4
    config.total_epochs = 50.0
    config.rematerialize = "blocks"
    config.model.train_proposals = 1000
    config.data.source = "coco:annotated"
    config.data.canvas_heights = (640,)
    config.data.canvas_widths = (640,)
    config.data.short_edge = (400, 640)
    config.data.threads = 4
    config.validation.short_edge = 640
    config.validation.every_epochs = 5.0
    config.optimizer.clip_norm = 10.0
    config.log_every = 10
    return config
