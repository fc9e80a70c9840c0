"""RandAugment on the host, with Pillow: timm's `rand-m9-mstd0.5-inc1` (SPEC 10). Does not import JAX."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5  # of applying a drawn operation

Fill = int | tuple[int, ...]  # colour of pixels that a geometric operation uncovers, 0..255 per channel
Apply = Callable[[Image.Image, float, Fill], Image.Image]


class Operation(NamedTuple):
    """One operation of RandAugment: how it changes an image, and how its argument depends on the magnitude."""

    apply: Apply  # (image, argument, fill colour) -> image
    argument: Callable[[float, float], float] = lambda _strength, _sign: 0.0  # strength in [0, 1], sign -1 or 1


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Apply:
    return lambda image, argument, fill: image.transform(
        image.size, Image.Transform.AFFINE, matrix(image, argument), Image.Resampling.BICUBIC, fillcolor=fill
    )


def _per_value(change: Callable[[int, int], int]) -> Apply:
    """Build an operation from a function of each pixel value, 0..255, and the argument truncated to an integer."""
    return lambda image, argument, _fill: image.point(
        [change(value, int(argument)) for value in range(256)] * len(image.getbands())
    )


def _enhance(kind: Any) -> Operation:  # noqa: ANN401 - an ImageEnhance class
    return Operation(
        lambda image, factor, _fill: kind(image).enhance(factor),
        lambda strength, sign: max(0.1, 1 + sign * 0.9 * strength),
    )


def _signed(maximum: float) -> Callable[[float, float], float]:
    return lambda strength, sign: sign * maximum * strength


# All operations grow stronger with the magnitude ("inc1").
OPERATIONS: Mapping[str, Operation] = {
    "AutoContrast": Operation(lambda image, _, _fill: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _, _fill: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _, _fill: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, degrees, fill: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill), _signed(30)
    ),
    "Posterize": Operation(
        _per_value(lambda value, bits: value & (256 - 2 ** (8 - bits))), lambda strength, _: 4 - int(4 * strength)
    ),
    "Solarize": Operation(
        _per_value(lambda value, threshold: value if value < threshold else 255 - value),
        lambda strength, _: 256 - int(256 * strength),
    ),
    "SolarizeAdd": Operation(
        _per_value(lambda value, amount: min(255, value + amount) if value < 128 else value),
        lambda strength, _: int(110 * strength),
    ),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": Operation(_affine(lambda _, factor: (1, factor, 0, 0, 1, 0)), _signed(0.3)),
    "ShearY": Operation(_affine(lambda _, factor: (1, 0, 0, factor, 1, 0)), _signed(0.3)),
    "TranslateX": Operation(_affine(lambda image, share: (1, 0, share * image.width, 0, 1, 0)), _signed(0.45)),
    "TranslateY": Operation(_affine(lambda image, share: (1, 0, 0, 0, 1, share * image.height)), _signed(0.45)),
}


@dataclass(frozen=True)
class RandAugment:
    """Draw operations for an image, and apply each with probability 0.5 at a normally distributed magnitude."""

    operations: int  # number drawn per image, with replacement
    magnitude: float  # mean magnitude, 0 to 10
    magnitude_std: float
    fill: tuple[int, ...]  # see `Fill`

    def __call__(self, pixels: np.ndarray, rng: random.Random) -> np.ndarray:
        """Augment an image, uint8 [H, W, 3 or 1], with draws from `rng`."""
        channels = pixels.shape[-1]
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        for operation in rng.choices(list(OPERATIONS.values()), k=self.operations):
            draw, magnitude, sign = rng.random(), rng.gauss(self.magnitude, self.magnitude_std), rng.choice((-1, 1))
            if draw < PROBABILITY:
                argument = operation.argument(min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE, float(sign))
                image = operation.apply(image, argument, self.fill if channels == 3 else self.fill[0])
        return np.atleast_3d(np.asarray(image))
