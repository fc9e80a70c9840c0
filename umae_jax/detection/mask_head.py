"""The mask head of one stage, with mask information flow (DET 1.9)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection.layers import HE_NORMAL, conv

SIDE = 14  # of the RoI features
MASK_SIDE = 2 * SIDE
CONVS = 4


class MaskHead(nnx.Module):
    """Predicts a mask per class for RoIs.

    Args:
        width: channels of the features.
        classes: without background.
        takes_previous: whether the features of the stage before are added to the RoI's.
    """

    def __init__(self, width: int, classes: int, *, takes_previous: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.previous = conv(width, width, 1, dtype=dtype, rngs=rngs) if takes_previous else None
        self.convs = nnx.List(conv(width, width, 3, dtype=dtype, rngs=rngs) for _ in range(CONVS))
        # A transposed convolution of size and stride 2 is a linear layer from each cell to 2 x 2 cells.
        self.upsample = nnx.Linear(
            width, 4 * width, use_bias=False, kernel_init=HE_NORMAL, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
        )
        self.upsample_bias = nnx.Param(jnp.zeros(width))
        self.logits = conv(width, classes, 1, dtype=dtype, rngs=rngs)

    def features(self, x: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """Return the features that `predict` and the next stage take, [R, SIDE, SIDE, width]."""
        if self.previous is not None and previous is not None:
            x = x + jax.nn.relu(self.previous(previous))
        for layer in self.convs:
            x = jax.nn.relu(layer(x))
        return x

    def predict(self, features: jax.Array) -> jax.Array:
        """Return logits, float32 [R, MASK_SIDE, MASK_SIDE, classes]."""
        rois, rows, columns, width = features.shape
        x = self.upsample(features).reshape(rois, rows, columns, 2, 2, width)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rois, 2 * rows, 2 * columns, width)
        x = jax.nn.relu(x + self.upsample_bias[...].astype(x.dtype)[None, None, None])
        return self.logits(x).astype(jnp.float32)
