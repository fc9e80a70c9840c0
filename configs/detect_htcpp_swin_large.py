"""HTC++ with Swin-L on COCO, boxes and masks, after UM-MAE pre-training (DET 3).

    python -m umae_jax.detect --config detect_htcpp_swin_large --workdir DIR --config.init=PRETRAINED \
        --config.data.source=coco:FOLDER --config.validation.source=coco:FOLDER \
        --config.data.semantic=FOLDER/stuffthingmaps/train2017

72 epochs; `--config detect_htcpp_swin_large:36` trains half as long. FOLDER has COCO's layout; the semantic maps are
COCO-stuff's. Published, with one scale: after UM-MAE 57.4 box AP, 49.8 mask AP; after ImageNet-22K with labels 57.1 and
49.5, in 36 epochs. Batch, hours and the configuration itself are unpublished: DET 2 says what is inferred. Copy-Paste
replaces InstaBoost. `python -m umae_jax.plan` estimates memory and hours.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config(epochs: str = "72") -> ConfigDict:
    config = default_config("swin_large", "detector")
    config.total_epochs = float(epochs)
    config.rematerialize = "blocks"
    config.model.semantic_classes = 183  # COCO-stuff
    config.model.classes = 80
    config.model.masks = True
    config.data.semantic = "coco/stuffthingmaps/train2017"
    if epochs == "72":
        config.optimizer.decay_at = (63 / 72, 69 / 72)
    return config
