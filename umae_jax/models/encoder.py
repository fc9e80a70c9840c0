"""The interface of all encoders: from patches to one map per stage (SPEC 3 to 5)."""

import re
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.masking import Mask, UniformMask, expand
from umae_jax.models import kernels, layers
from umae_jax.models.sizes import Sizes
from umae_jax.patches import patchify

_EMBEDDING = re.compile(r"encoder\.(patch_embed|patch_norm|positions|class_token)(\.|$)")
_BLOCK = re.compile(r"encoder\.(?:stages\.(?P<stage>\d+)\.)?(?:merge|blocks\.(?P<block>\d+))\.")


class Features(NamedTuple):
    """The output of an encoder."""

    maps: tuple[jax.Array, ...]  # of each stage i, [B, rows / 2**i, columns / 2**i, widths[i]]; float32 if normed
    class_token: jax.Array | None = None  # [B, 1, C], normed like the last map; None if the encoder has none


class Encoder(kernels.Stages):
    """Base class of all encoders. The same object encodes compact grids (with a mask) and whole images.

    Stage i has width `widths[i]` and half the resolution of the stage before. The compact grid has half the side of the
    whole grid. Its windows and sr_ratios are halved too, so that they cover the same extent (SPEC 3, 4).

    Args:
        sizes: checked here; a size that does not fit raises a UserError.
        patch_norm: epsilon of the layer norm that follows the patch embedding; None: no norm.
        final_norm: whether a layer norm follows the last stage; classifiers norm its mean instead (SPEC 8).
        dtype: dtype that linear layers compute in.
    """

    def __init__(
        self, sizes: Sizes, *, patch_norm: float | None, final_norm: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        sizes.check()
        width = sizes.widths[0]
        self.channels = sizes.channels
        self.patch = sizes.patch
        self.widths, self.depths, self.heads = tuple(sizes.widths), tuple(sizes.depths), tuple(sizes.heads)
        self.mean, self.std = tuple(sizes.mean), tuple(sizes.std)
        self.dtype = dtype
        self.patch_embed = layers.linear(sizes.patch**2 * sizes.channels, width, dtype=dtype, rngs=rngs)
        self.patch_norm = None if patch_norm is None else layers.layer_norm(width, epsilon=patch_norm, rngs=rngs)
        self.norm = layers.layer_norm(self.widths[-1], rngs=rngs) if final_norm else None

    @property
    def stride(self) -> int:
        """Side of an output token in pixels."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Raise a UserError if windows or sr_ratios do not fit a grid of patches that divides into output tokens."""

    def normalize(self, pixels: jax.Array) -> jax.Array:
        """Normalise integer pixels 0..255, [..., n * channels] -> float32; return floating pixels as they are."""
        if jnp.issubdtype(pixels.dtype, jnp.floating):
            return pixels
        copies = pixels.shape[-1] // self.channels
        mean, std = (
            jnp.asarray(np.tile(np.asarray(values, np.float32), copies)).reshape((1,) * (pixels.ndim - 1) + (-1,))
            for values in (self.mean, self.std)
        )
        return (pixels.astype(jnp.float32) / 255 - mean) / std

    def embed(
        self, pixels: jax.Array, hidden: jax.Array | None = None, mask_token: jax.Array | None = None
    ) -> jax.Array:
        """Embed patches without positions: pixels [B, H, W, channels] -> tokens [B, H / patch, W / patch, width].

        Args:
            pixels: a whole image, or the compact map of its sampled units; uint8, or normalised float32.
            hidden: bool [B, cell rows, cell columns], units whose content the encoder must not see.
            mask_token: [1, 1, width], replaces the tokens of hidden units before the patch norm.
        """
        with jax.named_scope("patch_embedding"):
            x = self.patch_embed(self.normalize(patchify(pixels, self.patch)))  # pixels are moved as uint8
            if hidden is not None and mask_token is not None:
                hidden = expand(hidden, x.shape[1] // hidden.shape[1])[..., None]
                x = jnp.where(hidden, mask_token.astype(x.dtype)[None], x)
            return x if self.patch_norm is None else self.patch_norm(x).astype(self.dtype)

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """Encode tokens from `embed`.

        Args:
            tokens: [B, rows, columns, width].
            mask: the mask that made the grid compact, uniform for pyramids; None on a whole image.
            drop_keys: [B], one key per image for drop path in training; None drops nothing.
        """
        raise NotImplementedError


class EncoderModel(nnx.Module):
    """Base class of models with a head on top of an encoder; numbers parameters for layer decay (SPEC 10)."""

    HEAD: ClassVar[tuple[str, ...]]  # attributes of the model that hold the parameters of the last layer
    encoder: Encoder

    @property
    def num_layers(self) -> int:
        """Index of the head's layer, the last one: the number of blocks + 1."""
        return sum(self.encoder.depths) + 1

    def layer_index(self, name: str) -> int:
        """Return the layer of a parameter, such as "encoder.stages.0.blocks.1.qkv.kernel".

        Embeddings are layer 0, block k is layer k + 1, and the head is the last layer. A merge belongs to the first
        block of its stage. An unknown name raises a ValueError.
        """
        if name.partition(".")[0] in self.HEAD:
            return self.num_layers
        if _EMBEDDING.match(name):
            return 0
        if match := _BLOCK.match(name):
            depths = self.encoder.depths
            stage, block = int(match["stage"] or 0), int(match["block"] or 0)
            if stage < len(depths) and block < depths[stage]:
                return sum(depths[:stage]) + block + 1
        raise ValueError(f"{name} is not a parameter of a {type(self).__name__} with depths {self.encoder.depths}")


def require_uniform(mask: Mask) -> UniformMask:
    """Return a uniform mask; raise a TypeError for any other, whose sampled units form no grid for a pyramid."""
    if not isinstance(mask, UniformMask):
        raise TypeError(f"a pyramid needs a uniform mask, whose sampled units form a grid, not {type(mask).__name__}")
    return mask
