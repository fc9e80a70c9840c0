"""The semantic branch: one map of features for all stages, trained to segment the whole image (DET 1.10)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection.layers import conv

LEVEL = 1  # P3, whose size the map has
STRIDE = 8
CONVS = 4
LOSS_WEIGHT = 0.2


class SemanticHead(nnx.Module):
    """Fuses all levels of the pyramid; `classes` counts things and stuff."""

    def __init__(self, width: int, classes: int, levels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.lateral = nnx.List(conv(width, width, 1, dtype=dtype, rngs=rngs) for _ in range(levels))
        self.convs = nnx.List(conv(width, width, 3, dtype=dtype, rngs=rngs) for _ in range(CONVS))
        self.embedding = conv(width, width, 1, dtype=dtype, rngs=rngs)
        self.logits = conv(width, classes, 1, dtype=dtype, rngs=rngs)

    def __call__(self, pyramid: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return float32 logits [B, H / 8, W / 8, classes] and features [B, H / 8, W / 8, width]."""
        size = pyramid[LEVEL].shape[1:3]
        parts = [
            jax.nn.relu(lateral(level if level.shape[1:3] == size else resize_aligned(level, size)))
            for lateral, level in zip(self.lateral, pyramid, strict=True)
        ]
        x = sum(parts[1:], start=parts[0])
        for layer in self.convs:
            x = jax.nn.relu(layer(x))
        return self.logits(x).astype(jnp.float32), jax.nn.relu(self.embedding(x))


def resize_aligned(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resize [B, h, w, C] to [B, *size, C] bilinearly, with the centres of corner cells aligned."""
    rows, columns = (jnp.asarray(_weights(old, new)) for old, new in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwc,oh,pw->bopc", x.astype(jnp.float32), rows, columns).astype(x.dtype)


def _weights(old: int, new: int) -> np.ndarray:
    """Return the bilinear weights of an axis, float32 [new, old]."""
    position = np.arange(new, dtype=np.float32) * np.float32((old - 1) / max(new - 1, 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old, dtype=np.float32))).astype(np.float32)


def semantic_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the weighted cross-entropy, divided by the number of all pixels, also the ignored ones.

    Args:
        logits: float32 [B, H, W, classes].
        labels: uint8 [B, H, W]; those that are no class, such as 255, have no loss.
    """
    known = labels < logits.shape[-1]
    classes = jnp.where(known, labels, 0).astype(jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return LOSS_WEIGHT * jnp.where(known, loss, 0).mean()
