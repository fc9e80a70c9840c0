"""The classifier (SPEC 8): the encoder on the whole image, the mean of its tokens, a norm and a linear head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, EncoderModel
from umae_jax.models.sizes import check_image_size

HEAD_STD = 2e-5


class Classifier(EncoderModel):
    """Classifies whole images with any encoder that has no final norm."""

    HEAD = ("head_norm", "head")

    def __init__(
        self, encoder: Encoder, *, image_size: tuple[int, int], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        check_image_size(image_size, encoder.stride, "the patch, doubled by every merge")
        encoder.check_grid((image_size[0] // encoder.patch, image_size[1] // encoder.patch), compact=False)
        self.encoder = encoder
        self.head_norm = layers.layer_norm(encoder.widths[-1], rngs=rngs)
        kernel_init = nnx.initializers.normal(HEAD_STD)  # the reference truncates it at +-2, which it never reaches
        self.head = layers.linear(encoder.widths[-1], classes, dtype=dtype, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, images: jax.Array, drop_keys: jax.Array | None = None) -> jax.Array:
        """Classify images [B, H, W, C], uint8 or normalised float32 -> logits, float32 [B, classes].

        `drop_keys` are the keys of drop path in training, one per image.
        """
        x = self.encoder(self.encoder.embed(images), drop_keys=drop_keys).maps[-1]
        x = x.astype(jnp.float32).mean((1, 2))  # [B, C]
        return self.head(self.head_norm(x)).astype(jnp.float32)
