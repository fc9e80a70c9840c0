"""Make small images and image files for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from umae_jax.data.decode import EncodedImage
from umae_jax.data.transforms import central_crop


def picture(seed=0, height=60, width=80):
    """Draw a smooth colourful picture: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(image, kind="PNG", **options):
    """Return the contents of an image file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def central_pixels(data, size):
    """Decode the central crop of an image file: uint8 [*size, 3]."""
    image = EncodedImage(data)
    return image.crop(central_crop(*image.size, size), size, 3)


def write_folder(folder: Path, count=12, classes=(), height=60, width=80):
    """Write a folder of JPEG files, spread over subfolders if classes are given."""
    for number in range(count):
        place = folder / classes[number % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, height, width)).save(place / f"{number:03}.jpg", quality=90)
    return folder
