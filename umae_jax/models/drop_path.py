"""Drop path (stochastic depth) for fine-tuning; pre-training drops nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth of one block: in training, each of its two branches is dropped for an image at this rate."""

    rate: float = 0.0
    block: int = 0

    def __call__(self, x: jax.Array, keys: jax.Array | None, branch: int) -> jax.Array:
        """Zero a branch's output [B, ...] for some images and scale it up for the others; without keys [B] keep it."""
        if keys is None or self.rate == 0:
            return x

        def keep(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, 2 * self.block + branch), 1 - self.rate)

        kept = jax.vmap(keep)(keys).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


NO_DROP = DropPath()


def drop_paths(rate: float, depths: Sequence[int]) -> list[list[DropPath]]:
    """Return the drop paths of each stage's blocks; rates rise linearly from 0 to `rate` over all blocks (SPEC 8)."""
    rates = np.linspace(0, rate, sum(depths))
    drops = [DropPath(float(value), block) for block, value in enumerate(rates)]
    return [drops[sum(depths[:stage]) : sum(depths[: stage + 1])] for stage in range(len(depths))]
