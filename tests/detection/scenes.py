"""Batches of the detection task: coloured rectangles on noise, in canvases that the images do not fill."""

import jax.numpy as jnp
import numpy as np

from umae_jax.data.dense_transforms import IGNORED, MAX_BOXES
from umae_jax.data.instances import CROP_SIZE
from umae_jax.tasks.detection import Task

OBJECTS = 3


def draw(config, count, seed=0, content=(48, 64)):
    """Return a batch of `count` images whose content has this height and width, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    arrays = {name: np.zeros((count, *array.shape), array.dtype) for name, array in Task(config).batch().items()}
    height, width = content
    for image in range(count):
        arrays["image"][image, :height, :width] = rng.integers(0, 60, (height, width, 3))
        for number in range(OBJECTS):
            corner, side = rng.uniform(0, [width / 2, height / 2]), rng.uniform(10, height / 2)
            box = np.array([*corner, *(corner + side)], np.float32)
            x1, y1, x2, y2 = box.astype(int)
            label = int(rng.integers(config.model.classes))
            arrays["image"][image, y1:y2, x1:x2] = np.eye(3, dtype=np.uint8)[label] * 255
            arrays["boxes"][image, number], arrays["labels"][image, number] = box, label
            arrays["box_valid"][image, number] = arrays["mask_valid"][image, number] = True
            arrays["masks"][image, number] = 255
        if "semantic" in arrays:
            arrays["semantic"][image] = IGNORED
            arrays["semantic"][image, : height // 8, : width // 8] = rng.integers(
                config.model.semantic_classes, size=(height // 8, width // 8)
            )
        arrays["image_size"][image] = content
    return arrays | {"sample_index": np.arange(count, dtype=np.uint32)}


def with_noise_in_invalid_slots(batch, classes, seed=1):
    """Return a batch with other boxes, labels and masks where there is no object."""
    rng = np.random.default_rng(seed)
    count = len(batch["image"])
    corners = rng.uniform(0, 40, (count, MAX_BOXES, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 20, corners.shape)], -1).astype(np.float32)
    labels = rng.integers(classes, size=(count, MAX_BOXES)).astype(np.int32)
    masks = rng.integers(0, 256, (count, MAX_BOXES, CROP_SIZE, CROP_SIZE)).astype(np.uint8)
    valid = batch["box_valid"]
    return batch | {
        "boxes": np.where(valid[..., None], batch["boxes"], boxes),
        "labels": np.where(valid, batch["labels"], labels),
        "masks": np.where(valid[..., None, None], batch["masks"], masks),
    }


def normalised(model, images):
    """Return the pixels that the encoder sees, float32."""
    return model.backbone.encoder.normalize(jnp.asarray(images))
