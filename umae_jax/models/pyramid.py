"""Feature maps for dense prediction (DET 1.2): an encoder, and a norm for each of four strides."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import require
from umae_jax.models import layers
from umae_jax.models.encoder import Encoder, EncoderModel
from umae_jax.patches import unpatchify

STRIDES = (4, 8, 16, 32)  # of the maps, in pixels
GLOBAL_MLP_RATIO = 4


class Upsample(nnx.Module):
    """A deconvolution of kernel size and stride 2, with a bias for each of its four places."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.proj = layers.linear(inputs, 4 * outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2 * H, 2 * W, C']."""
        return unpatchify(self.proj(x), 2)


class SimplePyramid(nnx.Module):
    """The simple feature pyramid of ViTDet: four maps from the one of a ViT, of stride 16.

    The maps of strides 4, 8, 16 and 32 have a quarter, half, all and all of the ViT's width.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.widths = (width // 4, width // 2, width, width)
        self.up4 = Upsample(width, width // 2, dtype=dtype, rngs=rngs)
        self.norm4 = layers.layer_norm(width // 2, rngs=rngs)
        self.up4_again = Upsample(width // 2, width // 4, dtype=dtype, rngs=rngs)
        self.up8 = Upsample(width, width // 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[B, H, W, C] -> maps of 4, 2, 1 and 1 / 2 times the height and width."""
        fine = self.up4_again(layers.gelu(self.norm4(self.up4(x)).astype(x.dtype)))
        return fine, self.up8(x), x, nnx.max_pool(x, (2, 2), (2, 2))


class Pyramid(EncoderModel):
    """Maps of strides 4, 8, 16 and 32 from any encoder that has no final norm.

    Args:
        encoder: a pyramid of four stages with patches of 4 pixels, or a ViT with patches of 16, followed by
            `SimplePyramid`; built for dense prediction.
        output_width: width of a linear layer after the norm of each map; None: no such layers.
        global_block: add a transformer block over all tokens of the last map before its norm (HTC++).

    Linear layers compute in the encoder's dtype, which is that of the maps.
    """

    HEAD = ("simple", "global_block", "norms", "projections")

    def __init__(
        self, encoder: Encoder, *, output_width: int | None = None, global_block: bool = False, rngs: nnx.Rngs
    ) -> None:
        stages, dtype = len(encoder.widths), encoder.dtype
        message = f"model.depths: dense prediction needs four stages, or a ViT, not {stages} stages"
        require(stages in (1, len(STRIDES)), message)
        patch = STRIDES[2] if stages == 1 else STRIDES[0]
        message = f"model.patch: dense prediction with {stages} stage(s) needs patches of {patch} pixels"
        require(encoder.patch == patch, f"{message}, not {encoder.patch}; set it to {patch}")
        self.encoder = encoder
        # Padding has zero pixels. If its tokens were 0, each norm would multiply their gradients by 1 / sqrt(epsilon).
        limit = (patch**2 * encoder.channels) ** -0.5
        bias = jax.random.uniform(rngs.params(), (encoder.widths[0],), jnp.float32, -limit, limit)
        encoder.patch_embed.bias = nnx.Param(bias)
        self.simple = SimplePyramid(encoder.widths[0], dtype=dtype, rngs=rngs) if stages == 1 else None
        widths = encoder.widths if self.simple is None else self.simple.widths
        heads = encoder.heads[-1]
        self.global_block = (
            layers.TransformerBlock(widths[-1], heads, GLOBAL_MLP_RATIO, dtype=dtype, rngs=rngs)
            if global_block
            else None
        )
        self.norms = nnx.List(layers.layer_norm(width, epsilon=layers.PYRAMID_EPSILON, rngs=rngs) for width in widths)
        self.projections = (
            nnx.List(layers.linear(width, output_width, dtype=dtype, rngs=rngs) for width in widths)
            if output_width is not None
            else None
        )
        self.widths = widths if output_width is None else len(widths) * (output_width,)

    def __call__(
        self, images: jax.Array, image_size: jax.Array | None = None, drop_keys: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Compute the maps of images.

        Args:
            images: [B, H, W, C], uint8 or normalised float32; H and W are multiples of 32.
            image_size: int32 [B, 2], height and width of the content in the upper left corner; normalised pixels
                beyond it become 0 (DET 1.1). None: the content fills the images.
            drop_keys: [B], one key per image for drop path in training; None drops nothing.

        Returns:
            Four maps [B, H / stride, W / stride, width], of `STRIDES` and `widths`.
        """
        tokens = self.encoder.apply_stage(self._embed, images, image_size)
        maps = list(self.encoder(tokens, drop_keys=drop_keys).maps)
        with jax.named_scope("pyramid"):
            if self.simple is not None:
                maps = list(self.simple(maps[0]))
            if self.global_block is not None:
                batch, _, _, width = maps[-1].shape
                maps[-1] = self.global_block(maps[-1].reshape(batch, -1, width)).reshape(maps[-1].shape)
            return tuple(self.encoder.apply_stage(self._output, x, stage) for stage, x in enumerate(maps))

    def _embed(self, images: jax.Array, image_size: jax.Array | None) -> jax.Array:
        if image_size is not None:
            images = _zero_padding(self.encoder.normalize(images), image_size)
        return self.encoder.embed(images)

    def _output(self, x: jax.Array, stage: int) -> jax.Array:
        x = self.norms[stage](x).astype(self.encoder.dtype)
        return x if self.projections is None else self.projections[stage](x)


def _zero_padding(pixels: jax.Array, image_size: jax.Array) -> jax.Array:
    """Set pixels [B, H, W, C] beyond each image's height and width [B, 2] to 0."""
    rows, columns = (jnp.arange(pixels.shape[axis])[None] < image_size[:, axis - 1, None] for axis in (1, 2))
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], pixels, jnp.zeros((), pixels.dtype))
