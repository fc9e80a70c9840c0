"""A stand-in for `nnx.Rngs` in models that are built as abstract arrays."""

import jax


class ConstantRngs:
    """Always returns the same key: the counter of `nnx.Rngs` is slow under `eval_shape`."""

    def params(self):
        return jax.random.key(0)
