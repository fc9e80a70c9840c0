"""The annotated objects of a batch of images, padded to a maximum per image."""

from typing import NamedTuple

import jax


class Targets(NamedTuple):
    """Objects of a batch; G is the maximum per image."""

    boxes: jax.Array  # float32 [B, G, 4], in pixels of the resized image
    labels: jax.Array  # int32 [B, G]
    valid: jax.Array  # bool [B, G], False for padding
    masks: jax.Array  # uint8 [B, G, M, M], each object's mask within its box; 255 is inside
    mask_valid: jax.Array  # bool [B, G], whether the object has a mask
    semantic: jax.Array | None = None  # uint8 [B, H / 8, W / 8], classes of pixels; 255 is ignored
