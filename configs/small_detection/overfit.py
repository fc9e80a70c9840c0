"""A small HTC++ that learns a few images by heart: box and mask AP50 above 95% on its own training images.

    python -m umae_jax.detect --config small_detection/overfit --workdir DIR \
        --config.data.source=coco:FOLDER/annotations_train.json@FOLDER/images \
        --config.validation.source=coco:FOLDER/annotations_train.json@FOLDER/images

It has every part of HTC++ but the semantic branch: three stages, interleaved execution, mask information flow, box
heads of convolutions with BatchNorm, GIoU loss, and the block of global attention. On the 14 training images of
fruitnuts18_instances.zip, AP50 of boxes and masks is 100% after 80 epochs, 98.7% after 120 and 100% after 160, and AP
is then 97% and 93% (`configs/small_detection/results/overfit.json`): 13 minutes of processor time.
"""

from ml_collections import ConfigDict

from umae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("swin_tiny", "detector")
    config.image_size = (192, 256)
    config.batch_size = 2
    config.dtype = "float32"
    config.total_epochs = 160.0

    config.model.widths = (24, 48, 96, 192)
    config.model.depths = (1, 1, 2, 1)
    config.model.heads = (1, 2, 4, 8)
    config.model.window = 8
    config.model.position_width = 16
    config.model.drop_path = 0.0
    config.model.pyramid_width = 32
    config.model.box_convs = 2
    config.model.box_hidden = 128
    config.model.rpn_samples = 64
    config.model.train_proposals = 128
    config.model.test_proposals = 128
    config.model.roi_samples = 64
    config.model.score_threshold = 0.01

    config.data.canvas_heights = (192,)
    config.data.canvas_widths = (256,)
    config.data.short_edge = (192, 192)
    config.data.threads = 2
    config.data.workers = 0
    config.augment.copy_paste = 0.0
    config.validation.short_edge = 192
    config.validation.every_epochs = 40.0

    config.optimizer.base_learning_rate = 0.128  # 1e-3 for 2 images
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_at = None
    config.optimizer.clip_norm = 10.0
    config.log_every = 20
    return config
