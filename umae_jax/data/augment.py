"""RandAugment on the host, with Pillow: timm's `rand-m9-mstd0.5-inc1` (SPEC 10). Imports nothing of JAX."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5  # of applying a drawn operation

Fill = int | tuple[int, ...]
Argument = Callable[[float, float], float]  # from strength in [0, 1] and sign, -1 or 1, to the argument of an operation


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, bits: float, _fill: Fill) -> Image.Image:
    """Keep the highest bits of every value. Zero bits give black, which `ImageOps.posterize` does not accept."""
    keep = 256 - 2 ** (8 - int(bits))
    return image.point([value & keep for value in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, amount: float, _fill: Fill) -> Image.Image:
    """Add to values below 128."""
    table = [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(kind: Any) -> Callable[[Image.Image, float, Fill], Image.Image]:  # noqa: ANN401 - an ImageEnhance class
    return lambda image, factor, _fill: kind(image).enhance(factor)


def _around_one(strength: float, sign: float) -> float:
    return max(0.1, 1 + sign * 0.9 * strength)


@dataclass(frozen=True)
class Operation:
    """One operation of RandAugment.

    Attributes:
        apply: changes an image, given an argument and the fill colour.
        argument: maps strength and sign to the argument.
    """

    apply: Callable[[Image.Image, float, Fill], Image.Image]
    argument: Argument = lambda _strength, _sign: 0.0


# Every operation becomes stronger with the magnitude ("inc1"). Bits and pixel values are truncated to integers.
OPERATIONS: Mapping[str, Operation] = {
    "AutoContrast": Operation(lambda image, _, _fill: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _, _fill: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _, _fill: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, degrees, fill: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill),
        lambda strength, sign: sign * 30 * strength,
    ),
    "Posterize": Operation(
        _posterize,
        lambda strength, _: 4 - int(4 * strength),
    ),
    "Solarize": Operation(
        lambda image, threshold, _fill: ImageOps.solarize(image, int(threshold)),
        lambda strength, _: 256 - int(256 * strength),
    ),
    "SolarizeAdd": Operation(_solarize_add, lambda strength, _: int(110 * strength)),
    "Color": Operation(_enhance(ImageEnhance.Color), _around_one),
    "Contrast": Operation(_enhance(ImageEnhance.Contrast), _around_one),
    "Brightness": Operation(_enhance(ImageEnhance.Brightness), _around_one),
    "Sharpness": Operation(_enhance(ImageEnhance.Sharpness), _around_one),
    "ShearX": Operation(
        lambda image, factor, fill: _affine(image, (1, factor, 0, 0, 1, 0), fill),
        lambda strength, sign: sign * 0.3 * strength,
    ),
    "ShearY": Operation(
        lambda image, factor, fill: _affine(image, (1, 0, 0, factor, 1, 0), fill),
        lambda strength, sign: sign * 0.3 * strength,
    ),
    "TranslateX": Operation(
        lambda image, fraction, fill: _affine(image, (1, 0, fraction * image.width, 0, 1, 0), fill),
        lambda strength, sign: sign * 0.45 * strength,
    ),
    "TranslateY": Operation(
        lambda image, fraction, fill: _affine(image, (1, 0, 0, 0, 1, fraction * image.height), fill),
        lambda strength, sign: sign * 0.45 * strength,
    ),
}


@dataclass(frozen=True)
class RandAugment:
    """Draw operations for an image and apply each with probability 0.5, at a normally distributed magnitude.

    Attributes:
        operations: number drawn per image, with replacement.
        magnitude: mean magnitude, 0 to 10.
        magnitude_std: standard deviation of the magnitude.
        fill: colour of pixels that a geometric operation uncovers, 0..255 per channel.
    """

    operations: int
    magnitude: float
    magnitude_std: float
    fill: tuple[int, ...]

    def __call__(self, pixels: np.ndarray, rng: random.Random) -> np.ndarray:
        """Augment an image, uint8 [H, W, 3 or 1], with draws from `rng`."""
        channels = pixels.shape[-1]
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        for operation in rng.choices(list(OPERATIONS.values()), k=self.operations):
            draw, magnitude, sign = rng.random(), rng.gauss(self.magnitude, self.magnitude_std), rng.choice((-1, 1))
            if draw < PROBABILITY:
                argument = operation.argument(min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE, float(sign))
                image = operation.apply(image, argument, self.fill if channels == 3 else self.fill[0])
        changed = np.asarray(image)
        return changed if channels == 3 else changed[..., None]
