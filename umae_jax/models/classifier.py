"""The classifier (SPEC 8): the encoder on the whole image, the mean of its tokens, a norm and a linear head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, check_image_size

HEAD_STD = 2e-5


class Classifier(nnx.Module):
    """Classifies whole images.

    Args:
        encoder: any, without a final norm.
        image_size: height and width in pixels.
        classes: how many.
        dtype: what the head computes in.

    Raises:
        UserError: if the image does not divide.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_size: tuple[int, int],
        classes: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_image_size(image_size, encoder.stride, "the patch, doubled by every merge")
        encoder.check_grid((image_size[0] // encoder.patch, image_size[1] // encoder.patch), compact=False)
        self.encoder = encoder
        self.head_norm = layers.layer_norm(encoder.widths[-1], rngs=rngs)
        kernel_init = nnx.initializers.normal(HEAD_STD)  # truncated at +-2, which it never reaches
        self.head = layers.linear(encoder.widths[-1], classes, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, images: jax.Array, drop_keys: jax.Array | None = None) -> jax.Array:
        """Normalised images [B, H, W, C] -> logits, float32 [B, classes].

        Args:
            drop_keys: one key an image, [B], to drop paths with in training.
        """
        x = self.encoder(self.encoder.embed(images), drop_keys=drop_keys).maps[-1]
        x = x.astype(jnp.float32).mean((1, 2))  # [B, C]
        return self.head(self.head_norm(x)).astype(jnp.float32)
