"""What every encoder is to those who use it: patches in, a map for every stage out (SPEC 3 to 5)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from umae_jax.errors import nearest_multiples, require
from umae_jax.masking import Mask, UniformMask, expand
from umae_jax.models import layers
from umae_jax.patches import patchify

Normalize = Callable[[jax.Array], jax.Array]


def already_normalized(pixels: jax.Array) -> jax.Array:
    """What stands for a normalisation where images come normalised."""
    return pixels


class Sizes(NamedTuple):
    """The numbers that every encoder has; sequences name one for each stage.

    Attributes:
        channels: of the image.
        patch: side of a patch in pixels.
        widths, depths, heads: of each stage, its width, blocks and attention heads.
        mlp_ratios: hidden width of a block's MLP over its width.
        drop_path: rate in the last block, rising linearly from 0 (SPEC 8).
    """

    channels: int
    patch: int
    widths: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    mlp_ratios: Sequence[int]
    drop_path: float = 0.0

    def check(self) -> None:
        """Check that the numbers fit together.

        Raises:
            UserError: naming the one that does not.
        """
        stages = len(self.depths)
        for key in ("widths", "heads", "mlp_ratios"):
            count = len(getattr(self, key))
            require(
                count == stages > 0,
                f"model.depths counts {stages} stage(s), model.{key} {count}; write one number a stage in each",
            )
        for stage, (width, count) in enumerate(zip(self.widths, self.heads, strict=True)):
            require(
                count > 0 and width % count == 0,
                f"model.heads: {count} heads do not divide the width {width} of stage {stage + 1}; "
                f"choose a divisor of {width}",
            )
        require(min(self.depths) > 0, f"model.depths: every stage needs at least one block, not {tuple(self.depths)}")

    def stages(self) -> Iterator[tuple[int | None, int, int, int, list[layers.DropPath]]]:
        """For each stage: the width before it (None at the first), its width, heads, MLP ratio and drop paths."""
        drops = layers.drop_paths(self.drop_path, self.depths)
        return zip((None, *self.widths[:-1]), self.widths, self.heads, self.mlp_ratios, drops, strict=True)


class Features(NamedTuple):
    """What an encoder makes of a grid of tokens.

    Attributes:
        maps: one map [B, rows / 2**i, columns / 2**i, widths[i]] for each stage i, the last one normed (float32) where
            the encoder has a final norm.
        class_token: [B, 1, C], normed likewise; None where the encoder has none.
    """

    maps: tuple[jax.Array, ...]
    class_token: jax.Array | None = None


class Encoder(nnx.Module):
    """The side that all encoders share. The same object encodes compact grids (a mask given) and whole images.

    Stage i has width `widths[i]` and half the resolution of the stage before it. On the compact grid, which is half as
    wide as the image, windows and sr_ratios are half as wide too: they cover the same extent (SPEC 3, 4).

    Args:
        sizes: its numbers.
        patch_norm: whether patches are normed after their embedding.
        final_norm: whether the last map is normed; classifiers norm its mean instead (SPEC 8).
        dtype: what the linear layers compute in.

    Raises:
        UserError: if the numbers do not fit together.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        patch_norm: bool,
        final_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        sizes.check()
        width = sizes.widths[0]
        self.channels = sizes.channels
        self.patch = sizes.patch
        self.widths = tuple(sizes.widths)
        self.dtype = dtype
        self.patch_embed = layers.linear(sizes.patch**2 * sizes.channels, width, dtype=dtype, rngs=rngs)
        self.patch_norm = layers.layer_norm(width, rngs=rngs) if patch_norm else None
        self.norm = layers.layer_norm(self.widths[-1], rngs=rngs) if final_norm else None

    @property
    def stride(self) -> int:
        """Pixels on the side of one output token."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_grid(self, grid: tuple[int, int], *, compact: bool) -> None:
        """Check that a grid of patches [rows, columns], each a multiple of the last stage's token, can be encoded.

        Raises:
            UserError: naming the numbers that could.
        """

    def embed(
        self,
        pixels: jax.Array,
        hidden: jax.Array | None = None,
        mask_token: jax.Array | None = None,
        normalize: Normalize = already_normalized,
    ) -> jax.Array:
        """Pixels [B, H, W, channels] to tokens [B, H / patch, W / patch, width], content only.

        Args:
            pixels: a whole image or the compact map of its sampled units, float32 and normalised or uint8.
            hidden: bool [B, cell rows, cell columns], the units whose content the encoder must not see.
            mask_token: [1, 1, width], takes the place of their tokens and goes through the same norm as they do.
            normalize: uint8 pixels [..., n * channels] to normalised float32.
        """
        with jax.named_scope("patch_embedding"):
            x = self.patch_embed(normalize(patchify(pixels, self.patch)))
            if hidden is not None and mask_token is not None:
                hidden = expand(hidden, x.shape[1] // hidden.shape[1])[..., None]
                x = jnp.where(hidden, mask_token.astype(x.dtype)[None], x)
            return x if self.patch_norm is None else self.patch_norm(x).astype(self.dtype)

    def __call__(self, tokens: jax.Array, mask: Mask | None = None, drop_keys: jax.Array | None = None) -> Features:
        """Tokens from `embed` to features.

        Args:
            tokens: [B, rows, columns, width].
            mask: the mask that made the grid compact; None on a whole image.
            drop_keys: one key an image, [B], to drop paths with in training; None keeps them all.
        """
        raise NotImplementedError


def uniform(mask: Mask | None) -> UniformMask | None:
    """A mask that leaves a grid, for encoders whose tokens have neighbours; or none, for a whole image.

    Raises:
        TypeError: for any other mask.
    """
    if mask is not None and not isinstance(mask, UniformMask):
        raise TypeError(f"a pyramid needs a uniform mask, whose survivors form a grid, not {type(mask).__name__}")
    return mask


def check_image_size(image_size: tuple[int, int], multiple: int, reason: str) -> None:
    """Check that an image divides into whole output tokens.

    Raises:
        UserError: naming the nearest sizes that do.
    """
    for name, size in zip(("height", "width"), image_size, strict=True):
        require(
            size > 0 and size % multiple == 0,
            f"image_size: the {name} {size} is not a multiple of {multiple} ({reason}); "
            f"choose {nearest_multiples(size, multiple)}",
        )
