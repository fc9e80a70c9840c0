"""The feature pyramid network (DET 1.3)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection.layers import conv

STRIDES = (4, 8, 16, 32, 64)  # of P2 to P6


class Fpn(nnx.Module):
    """Turns the four maps of a backbone into P2 to P6, all of `width` channels."""

    def __init__(self, widths: Sequence[int], width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        xavier = nnx.initializers.xavier_uniform()
        self.lateral = nnx.List(conv(inputs, width, 1, init=xavier, dtype=dtype, rngs=rngs) for inputs in widths)
        self.output = nnx.List(conv(width, width, 3, init=xavier, dtype=dtype, rngs=rngs) for _ in widths)

    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Return P2 to P6, [B, H / stride, W / stride, width], from C2 to C5."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            merged[level - 1] += _upsample(merged[level], merged[level - 1].shape[1:3])
        pyramid = [output(x) for output, x in zip(self.output, merged, strict=True)]
        return (*pyramid, pyramid[-1][:, ::2, ::2])


def _upsample(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resize [B, h, w, C] to [B, *size, C]: each cell takes the value of the nearest coarser one."""
    for axis, (new, old) in enumerate(zip(size, x.shape[1:3], strict=True), 1):
        x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return x
