"""Bicubic, antialiased resizing of 8-bit pixels, by vector instructions where there is a package for them."""

import math

import numpy as np
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # it has no package for this kind of machine
    cykooz_resizer = None

Box = tuple[float, float, float, float]  # left, upper, right, lower

_TAPS = 2  # of bicubic interpolation to either side, in pixels of the coarser image


def reach(extent: float, length: int) -> int:
    """How many pixels beyond its box a resized side depends on, at most.

    Args:
        extent: of the box, in pixels.
        length: of the output.
    """
    return math.ceil(_TAPS * max(1.0, extent / length)) + 1


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """What Pillow's `resize` with BICUBIC and a box gives, but for rounding.

    Both round to 8 bits between the two directions, which they take in another order. Their results lie 0.16 levels of
    255 apart on average, and each 0.30 from the exact sums; tests/data/test_resize.py bounds the difference.

    Args:
        pixels: uint8 [height, width, 3 or 1].
        box: inside of the image; what lies around it is used as far as the kernel reaches.
        size: height and width of the output.

    Returns:
        uint8 [*size, 3 or 1].
    """
    (left, upper, right, lower), channels = box, pixels.shape[-1]
    # Copy no more than the output depends on.
    across, down = reach(right - left, size[1]), reach(lower - upper, size[0])
    first, top = max(0, math.floor(left) - across), max(0, math.floor(upper) - down)
    pixels = pixels[top : math.ceil(lower) + down, first : math.ceil(right) + across]
    left, right, upper, lower = left - first, right - first, upper - top, lower - top
    if cykooz_resizer is None:
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        out = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, (left, upper, right, lower)))
        return out if channels == 3 else out[..., None]
    kind = cykooz_resizer.PixelType.U8x3 if channels == 3 else cykooz_resizer.PixelType.U8
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    resized = cykooz_resizer.ImageData(size[1], size[0], kind)
    bicubic = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)  # a = -0.5, as Pillow's
    crop = cykooz_resizer.CropBox(left, upper, right - left, lower - upper)
    options = cykooz_resizer.ResizeOptions(resize_alg=bicubic, crop_box=crop)
    cykooz_resizer.Resizer().resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size, channels)
