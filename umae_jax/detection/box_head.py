"""The box head of one stage (DET 1.7)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.detection.layers import BatchNorm, conv

SIDE = 7  # of the RoI features


class BoxHead(nnx.Module):
    """Predicts the class and the box of RoIs, the same box for all classes.

    Args:
        width: channels of the features.
        hidden: width of the linear layers.
        classes: without the background, which is the last class.
        convs: 3 x 3 convolutions with BatchNorm before one linear layer; 0: two linear layers.
    """

    def __init__(self, width: int, hidden: int, classes: int, *, convs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List(conv(width, width, 3, bias=False, dtype=dtype, rngs=rngs) for _ in range(convs))
        self.norms = nnx.List(BatchNorm(width) for _ in range(convs))
        inputs = [SIDE * SIDE * width] + ([] if convs else [hidden])
        self.linear = nnx.List(self._linear(size, hidden, None, dtype, rngs) for size in inputs)
        self.classify = self._linear(hidden, classes + 1, 0.01, dtype, rngs)
        self.refine = self._linear(hidden, 4, 0.001, dtype, rngs)

    @staticmethod
    def _linear(inputs: int, outputs: int, std: float | None, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
        init = nnx.initializers.xavier_uniform() if std is None else nnx.initializers.normal(std)
        return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, features: jax.Array, valid: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Return class logits [R, classes + 1] and deltas [R, 4], in float32.

        Args:
            features: [R, SIDE, SIDE, width].
            valid: bool [R], the RoIs that count in BatchNorm.
            train: whether BatchNorm uses the statistics of these RoIs.
        """
        x = features
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(layer(x), valid, train=train))
        x = x.reshape(x.shape[0], -1)
        for linear in self.linear:
            x = jax.nn.relu(linear(x))
        return self.classify(x).astype(jnp.float32), self.refine(x).astype(jnp.float32)
