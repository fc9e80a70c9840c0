"""The sizes of an encoder, and checks that they fit together."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from umae_jax.errors import nearest_multiples, require
from umae_jax.models.layers import DropPath


class Stage(NamedTuple):
    """The sizes of one stage."""

    inputs: int | None  # width of the stage before; None at the first
    width: int
    heads: int
    mlp_ratio: int  # hidden width of a block's MLP over the block's width
    drops: list[DropPath]  # one per block


class Sizes(NamedTuple):
    """The sizes that every encoder has."""

    channels: int  # of the image
    patch: int  # side of a patch in pixels
    widths: Sequence[int]  # one per stage, like the next three; see `Stage`
    depths: Sequence[int]
    heads: Sequence[int]
    mlp_ratios: Sequence[int]
    mean: Sequence[float]  # per channel, of pixels in [0, 1]
    std: Sequence[float]
    drop_path: float  # rate of the last block; it rises linearly from 0 (SPEC 8)

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
        rates = np.linspace(0, self.drop_path, sum(self.depths))
        drops = (DropPath(float(rate), block) for block, rate in enumerate(rates))
        for stage, depth in enumerate(self.depths):
            inputs = self.widths[stage - 1] if stage else None
            sizes = self.widths[stage], self.heads[stage], self.mlp_ratios[stage]
            yield Stage(inputs, *sizes, list(islice(drops, depth)))


def check_image_size(image_size: tuple[int, int], multiple: int, reason: str) -> None:
    """Raise a UserError naming the nearest sizes unless height and width are multiples of `multiple` pixels."""
    for name, size in zip(("height", "width"), image_size, strict=True):
        message = f"image_size: the {name} {size} is not a multiple of {multiple} ({reason})"
        require(size > 0 and size % multiple == 0, f"{message}; choose {nearest_multiples(size, multiple)}")
