"""From a configuration to a model."""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from umae_jax.models.autoencoder import MaskedAutoencoder
from umae_jax.models.swin import Swin


def build_autoencoder(config: ConfigDict, rngs: nnx.Rngs) -> MaskedAutoencoder:
    """The masked autoencoder that a configuration describes, freshly initialised.

    Raises:
        UserError: if its numbers do not fit together.
    """
    model, dtype = config.model, jnp.dtype(config.dtype)
    encoder = Swin(
        channels=model.channels,
        patch=model.patch,
        width=model.width,
        depths=model.depths,
        heads=model.heads,
        window=model.window,
        position_width=model.position_width,
        dtype=dtype,
        rngs=rngs,
    )
    return MaskedAutoencoder(
        encoder,
        image_size=config.image_size,
        channels=model.channels,
        secondary_ratio=model.secondary_ratio,
        decoder_factor=model.decoder_factor,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        normalize_target=model.normalize_target,
        reference_order=model.reference_order,
        dtype=dtype,
        rngs=rngs,
    )
