"""The two-stage detector: backbone, FPN, RPN and a cascade of RoI heads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection.cascade import CascadeOptions, RoiHeads
from umae_jax.detection.fpn import Fpn
from umae_jax.detection.rpn import Rpn, RpnOptions
from umae_jax.detection.targets import Targets
from umae_jax.models.encoder import Encoder
from umae_jax.models.pyramid import Pyramid


class Detected(NamedTuple):
    """Detections of a batch, D per image, the best first, in pixels of the resized image."""

    boxes: jax.Array  # float32 [B, D, 4]
    scores: jax.Array  # float32 [B, D]
    labels: jax.Array  # int32 [B, D]
    valid: jax.Array  # bool [B, D]
    masks: jax.Array | None  # float32 [B, D, 28, 28], probabilities within the boxes


class Detector(nnx.Module):
    """Detects and segments objects.

    Args:
        backbone: returns four maps of strides 4 to 32.
        classes: number of classes, without background.
        width: channels of the FPN and of all heads.
        rpn, cascade: their options.
        dtype: dtype that convolutions and linear layers compute in.
    """

    def __init__(
        self,
        backbone: Pyramid,
        classes: int,
        *,
        width: int,
        rpn: RpnOptions,
        cascade: CascadeOptions,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.backbone = backbone
        self.fpn = Fpn(backbone.widths, width, dtype=dtype, rngs=rngs)
        self.rpn = Rpn(width, rpn, dtype=dtype, rngs=rngs)
        self.roi_heads = RoiHeads(width, classes, cascade, dtype=dtype, rngs=rngs)

    @property
    def encoder(self) -> Encoder:
        """The encoder of the backbone, for probes."""
        return self.backbone.encoder

    def pyramid(
        self, images: jax.Array, image_size: jax.Array, drop_keys: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Return P2 to P6, [B, H / stride, W / stride, width].

        Args:
            images: [B, H, W, C], uint8 or normalised float32; the content lies in the upper left corner.
            image_size: int32 [B, 2], height and width of the content.
            drop_keys: [B], keys of drop path in training.
        """
        with jax.named_scope("backbone"):
            maps = self.backbone(images, image_size, drop_keys)
        with jax.named_scope("fpn"):
            return self.fpn(maps)

    def losses(
        self, images: jax.Array, image_size: jax.Array, targets: Targets, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """Return the losses of a batch by name, with their weights, and accuracies of the box heads.

        Updates the running statistics of BatchNorm. See `pyramid` for the images.

        Args:
            targets: of the batch.
            keys: [B], one random key per image.
        """
        drop, rpn_keys, roi_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys).swapaxes(0, 1)
        pyramid = self.pyramid(images, image_size, drop)
        with jax.named_scope("rpn"):
            predicted = self.rpn(pyramid)
            losses = self.rpn.losses(pyramid, *predicted, targets, image_size, rpn_keys)
        with jax.named_scope("proposals"):
            proposals = self.rpn.propose(pyramid, *predicted, image_size, train=True)
        return losses | self.roi_heads.losses(pyramid, proposals, targets, image_size, roi_keys)

    def __call__(self, images: jax.Array, image_size: jax.Array) -> Detected:
        """Detect objects. See `pyramid` for the images."""
        pyramid = self.pyramid(images, image_size)
        with jax.named_scope("rpn"):
            predicted = self.rpn(pyramid)
        with jax.named_scope("proposals"):
            proposals = self.rpn.propose(pyramid, *predicted, image_size, train=False)
        found, masks = self.roi_heads.detect(pyramid, proposals, image_size)
        return Detected(found.boxes, found.scores, found.labels, found.valid, masks)


def total_loss(losses: dict[str, jax.Array]) -> jax.Array:
    """Return the sum of all losses; accuracies do not count."""
    return sum((value for name, value in losses.items() if not name.endswith("accuracy")), start=jnp.zeros(()))
