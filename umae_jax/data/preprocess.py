"""Images of any kind and size as the uint8 pixels that evaluation sees. Does not import JAX."""

import os
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from umae_jax.data.decode import EncodedImage, resize, to_pixels
from umae_jax.data.transforms import central_crop
from umae_jax.errors import UserError, require
from umae_jax.files import first_line, read_file

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[Any]:
    """Return a list of images, given one, several, or an array [B, H, W, C]."""
    if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4:
        return [images]
    return list(cast(Iterable[ImageLike], images))


def crop_image(
    image: ImageLike, size: tuple[int, int], channels: int, share: float, max_pixels: int | None = None
) -> np.ndarray:
    """Return the central crop of an image, resized, as `LoadCentralCrop` does: uint8 [*size, channels].

    Args:
        image: path of a file, a Pillow image, or uint8 [H, W] or [H, W, 1, 3 or 4], gray, RGB or RGBA.
        size: height and width of the output.
        channels: 3 for RGB, 1 for grayscale.
        share: fraction of the sides of the largest central crop to keep.
        max_pixels: that a file may have; see `EncodedImage`.

    Raises:
        UserError: naming a file that cannot be read, or an array that is no image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            encoded = EncodedImage(read_file(os.fspath(image)), max_pixels)
            return encoded.crop(central_crop(*encoded.size, size, share), size, channels)
        except UnidentifiedImageError:
            raise UserError(f"images: {image} is not an image that Pillow can read") from None
        except Exception as error:  # Pillow raises many types
            raise UserError(f"images: {image} cannot be read ({first_line(error)})") from None
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
        require(
            is_image and array.size > 0 and array.dtype == np.uint8,
            f"images: {list(array.shape)}, {array.dtype}, is no image; write uint8 [H, W, C] with 1, 3 or 4 channels",
        )
        image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    pixels = to_pixels(image, channels)
    height, width = pixels.shape[:2]
    return resize(pixels, central_crop(width, height, size, share), size)
