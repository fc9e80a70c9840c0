"""The sizes of an encoder, and checks that they fit together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from umae_jax.errors import UserError, nearest_multiples, require
from umae_jax.masking import visible_count
from umae_jax.models.drop_path import DropPath, drop_paths


class Stage(NamedTuple):
    """The sizes of one stage.

    Attributes:
        inputs: width of the stage before; None at the first.
        width, heads: width and attention heads of its blocks.
        mlp_ratio: hidden width of a block's MLP over the block's width.
        drops: drop path of each block.
    """

    inputs: int | None
    width: int
    heads: int
    mlp_ratio: int
    drops: list[DropPath]


class Sizes(NamedTuple):
    """The sizes that every encoder has; sequences hold one number per stage.

    Attributes:
        channels: of the image.
        patch: side of a patch in pixels.
        widths, depths, heads, mlp_ratios: of each stage; see `Stage`.
        mean, std: of each channel's pixels, as fractions of 255.
        drop_path: rate in the last block, rising linearly from 0 (SPEC 8).
    """

    channels: int
    patch: int
    widths: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    mlp_ratios: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    drop_path: float = 0.0

    def check(self) -> None:
        """Raise a UserError naming the first size that does not fit the others."""
        stages = len(self.depths)
        for key in ("widths", "heads", "mlp_ratios"):
            count = len(getattr(self, key))
            message = f"model.{key} has {count} number(s), model.depths {stages}; write one per stage in each"
            require(count == stages > 0, message)
        for stage, (width, heads) in enumerate(zip(self.widths, self.heads, strict=True), 1):
            message = f"model.heads: {heads} heads do not divide the width {width} of stage {stage}; choose a divisor"
            require(heads > 0 and width % heads == 0, message)
        require(min(self.depths) > 0, f"model.depths: every stage needs at least one block, not {tuple(self.depths)}")

    def stages(self) -> Iterator[Stage]:
        """Yield the sizes of each stage."""
        drops = drop_paths(self.drop_path, self.depths)
        numbers = zip((None, *self.widths[:-1]), self.widths, self.heads, self.mlp_ratios, drops, strict=True)
        return (Stage(*stage) for stage in numbers)


def check_image_size(image_size: tuple[int, int], multiple: int, reason: str) -> None:
    """Raise a UserError naming the nearest sizes unless height and width are multiples of `multiple` pixels."""
    for name, size in zip(("height", "width"), image_size, strict=True):
        message = f"image_size: the {name} {size} is not a multiple of {multiple} ({reason})"
        require(size > 0 and size % multiple == 0, f"{message}; choose {nearest_multiples(size, multiple)}")


def check_windows(window: int, grid: tuple[int, int], *, stages: int) -> None:
    """Raise a UserError naming the nearest windows unless half of `window` tiles a compact grid, or covers it.

    Args:
        window: side of a window on a whole image, in tokens.
        grid: rows and columns of the compact grid's patches, halved from stage to stage.
        stages: number of stages.
    """
    sides = [size // 2**stage for size in grid for stage in range(stages)]

    def fits(window: int) -> bool:
        return all(side <= window // 2 or side % (window // 2) == 0 for side in sides)

    if not fits(window):
        nearest = sorted(filter(fits, range(4, 2 * max(grid) + 1, 2)), key=lambda other: abs(other - window))
        raise UserError(
            f"model.window: windows of {window // 2} tokens (half of model.window on the compact grid) do not tile "
            f"stages of {' x '.join(map(str, grid))} tokens, halved from stage to stage; choose "
            + " or ".join(map(str, sorted(nearest[:2])))
        )


def check_secondary_ratio(ratio: float, cells: tuple[int, int]) -> None:
    """Raise a UserError unless secondary masking leaves some of the sampled units, one per cell, visible."""
    require(0 <= ratio < 1, f"model.secondary_ratio must lie in [0, 1), not {ratio}")
    message = f"model.secondary_ratio: {ratio} hides all {cells[0] * cells[1]} sampled units; lower it"
    require(visible_count(cells, ratio) > 0, message)


def check_decoder_factor(factor: int, patches: int) -> None:
    """Raise a UserError unless the factor divides the number of patches along one output token."""
    message = f"model.decoder_factor: {factor} does not divide {patches}, the patches along one output token"
    require(factor > 0 and patches % factor == 0, f"{message}; choose a divisor of {patches}")


def check_decoder(width: int, depth: int, heads: int) -> None:
    """Raise a UserError unless the sizes of a decoder fit together."""
    require(depth > 0, f"model.decoder_depth must be at least 1, not {depth}")
    message = f"model.decoder_width: {width} is not a multiple of 4, which its position table needs"
    require(width % 4 == 0, f"{message}; choose {nearest_multiples(width, 4)}")
    message = f"model.decoder_heads: {heads} heads do not divide the decoder's width {width}"
    require(heads > 0 and width % heads == 0, message)
