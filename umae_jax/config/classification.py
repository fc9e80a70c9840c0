"""Keys and recipe of classification, fine-tuned or from scratch (SPEC 10)."""

from typing import Any

from umae_jax.config.base import BOOLEAN, ENCODERS, METHODS, Key, Method, integer, number, optional

DROP_PATHS = {"swin_large": 0.2}  # other sizes: 0.1
LAYER_DECAYS = {"swin_large": 0.7, "vit_small": 0.8, "vit_base": 0.8, "vit_large": 0.8, "vit_huge": 0.8}  # else 0.85

_KEYS = {
    "model.classes": Key(
        1000, "number of classes; None: as many as the training data has", optional(integer(2, 2**20))
    ),
    "model.drop_path": Key(0.1, "drop path rate of the last block; 0.2 in `swin_large`", number("[0, 1)")),
    "freeze_encoder": Key(False, "train the head alone; the encoder keeps the weights of `init`", BOOLEAN),
    "early_stop": Key(
        None, "validations without a higher top-1 after which the run ends; None: never", optional(integer(1))
    ),
    "validation.fraction": Key(
        0.1,
        "part of `data.source` that validates when `validation.source` is None; 0: none",
        number("[0, 1)"),
        missing=0.0,  # earlier versions trained on all images
    ),
    "augment.operations": Key(2, "RandAugment operations per image", integer(0, 16)),
    "augment.magnitude": Key(9.0, "magnitude of RandAugment, 0 to 10", number("[0, 10]")),
    "augment.magnitude_std": Key(0.5, "standard deviation of the magnitude", number("[0, inf)")),
    "augment.erase": Key(0.25, "probability of random erasing, by noise, per image", number("[0, 1]")),
    "augment.mixup": Key(0.8, "mixup alpha; 0: off", number("[0, 1000]")),
    "augment.cutmix": Key(1.0, "CutMix alpha; 0: off; with both on, each image draws one", number("[0, 1000]")),
    "augment.label_smoothing": Key(0.1, "probability spread evenly over all classes", number("[0, 1)")),
    "optimizer.layer_decay": Key(
        0.85, "learning rate / the next layer's; `swin_large`: 0.7, ViTs: 0.8", number("(0, 1]")
    ),
}


def _recipe(size: str, encoder: str) -> dict[str, Any]:
    return {
        "batch_size": 1024,
        "total_epochs": 100.0,
        "picture_every": 0,
        "data.area": 0.08,
        "validation.crop": ENCODERS[encoder].eval_crop,
        "optimizer.base_learning_rate": 5e-4,
        "optimizer.beta2": 0.999,
        "optimizer.final_learning_rate": 1e-6,
        "optimizer.warmup_epochs": 5.0,
        "optimizer.layer_decay": LAYER_DECAYS.get(size, 0.85),
        "model.drop_path": DROP_PATHS.get(size, 0.1),
    }


METHODS["classifier"] = Method(summary="1000 classes", task="umae_jax.tasks.classification", keys=_KEYS, recipe=_recipe)
