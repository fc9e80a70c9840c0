"""Wrong decoder positions of the reference's pyramids (SPEC 6), for its checkpoints and golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax.masking import Mask
from umae_jax.models.encoder import require_uniform


def in_reference_order(mask: Mask, positions: jax.Array) -> jax.Array:
    """Return positions in the reference's order: [1, unit rows, unit columns, D] -> [B, cell rows, cell columns, D].

    The sampled units of a uniform mask are in row-major order of the cells. The reference gives them positions in
    row-major order of the units.
    """
    offset = require_uniform(mask).offset
    rows, columns = offset.shape[1:]
    row = 2 * np.arange(rows)[None, :, None] + offset // 2
    column = 2 * np.arange(columns)[None, None, :] + offset % 2
    units = jnp.sort((row * 2 * columns + column).reshape(offset.shape[0], -1), axis=-1)
    return positions.reshape(-1, positions.shape[-1])[units].reshape(*offset.shape, -1)
