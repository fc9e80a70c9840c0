"""Layers of the detection heads: convolutions of [N, H, W, C], and BatchNorm over valid RoIs.

Parameters are float32. Convolutions and linear layers compute in the model's dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
MOMENTUM = 0.1  # of the running statistics
EPSILON = 1e-5


def conv(
    inputs: int,
    outputs: int,
    side: int,
    *,
    init: nnx.Initializer = HE_NORMAL,
    bias: bool = True,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Build a convolution of stride 1 that keeps the size of the map; its bias is 0."""
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        padding="SAME",
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """BatchNorm whose statistics are those of the valid rows of the global batch; computed in float32 (DET 1.7)."""

    def __init__(self, width: int) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array, valid: jax.Array, *, train: bool) -> jax.Array:
        """Norm each channel of [R, H, W, C].

        Args:
            x: the rows.
            valid: bool [R]; the other rows do not count.
            train: use the statistics of these rows, and update the running ones.
        """
        wide = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            weights = jnp.broadcast_to(valid[:, None, None, None].astype(jnp.float32), (*x.shape[:3], 1))
            count = jnp.maximum(weights.sum(), 1)
            mean = (weights * wide).sum((0, 1, 2)) / count
            var = (weights * (wide - mean[None, None, None]) ** 2).sum((0, 1, 2)) / count
            unbiased = jax.lax.stop_gradient(var) * count / jnp.maximum(count - 1, 1)
            self.mean[...] += MOMENTUM * (jax.lax.stop_gradient(mean) - self.mean[...])
            self.var[...] += MOMENTUM * (unbiased - self.var[...])
        factor = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
        normed = (wide - mean[None, None, None]) * factor[None, None, None] + self.bias[...][None, None, None]
        return normed.astype(x.dtype)
