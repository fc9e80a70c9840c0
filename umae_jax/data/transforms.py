"""On the host: from encoded bytes to uint8 pixels of one size. Imports nothing of JAX."""

import io
import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from umae_jax.data.augment import RandAugment
from umae_jax.data.jpeg import decode_upper, read_layout
from umae_jax.data.resize import Box, reach, resize
from umae_jax.data.sources import NO_LABEL, Source
from umae_jax.errors import require

AREA_TRIES = 10  # torchvision's number, after which a random resized crop falls back to a central one
# After so many records that cannot be read, a sample gives up; the loader then stops the run.
READ_TRIES = 32
# A JPEG's decoder shrinks what would be shrunk anyway, but leaves this many pixels for each one wanted, on either axis.
SHRINK_MARGIN = 2.0


def sample_rng(seed: int, index: int) -> random.Random:
    """The generator of one sample, by the run's seed and the sample's global index.

    Python's own: it takes a fifth of the time that NumPy's takes to set up and to draw a number at a time.
    """
    return random.Random(seed << 64 | index)


def random_crop(rng: random.Random, width: int, height: int, size: tuple[int, int], area: float) -> Box:
    """The box of a random resized crop (SPEC 10): `area` to all of the image, aspect ratio 3/4 to 4/3 of the output's.

    Args:
        rng: the image's own generator.
        width, height: of the image.
        size: height and width of the output.
        area: the smallest share of the image to keep.
    """
    aspect = size[1] / size[0]
    for _ in range(AREA_TRIES):
        target = width * height * rng.uniform(area, 1)
        ratio = aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, upper = rng.randrange(width - box_width + 1), rng.randrange(height - box_height + 1)
            return (left, upper, left + box_width, upper + box_height)
    return central_crop(width, height, size)


def central_crop(width: int, height: int, size: tuple[int, int], share: float = 1.0) -> Box:
    """The largest central box of the output's aspect ratio: resizing it is to resize the shorter side and crop.

    Args:
        width, height: of the image.
        size: height and width of the output.
        share: of the largest box's side that is kept, such as 224 / 256 (SPEC 10).
    """
    scale = share * min(width / size[1], height / size[0])
    box_width, box_height = size[1] * scale, size[0] * scale
    left, upper = max(0.0, (width - box_width) / 2), max(0.0, (height - box_height) / 2)  # rounding may fall below 0
    return (left, upper, left + box_width, upper + box_height)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any image as 8-bit "RGB" or "L": 16 bits are scaled, what is transparent shows white."""
    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would clip it
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


class EncodedImage:
    """An opened image, not yet decoded: its size is known, and its pixels can be decoded as coarsely as a crop allows.

    Attributes:
        size: width and height of the image the right way up.

    Raises:
        OSError and others of Pillow's: if the bytes are no image.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._layout = read_layout(data)
        if self._layout is not None and not self._layout.metadata:  # most of them: Pillow need not look
            self._orientation, self.size = 1, (self._layout.width, self._layout.height)
            return
        self._orientation = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = self._image.size
        self.size = (height, width) if self._orientation >= 5 else (width, height)

    @cached_property
    def _image(self) -> Image.Image:
        return Image.open(io.BytesIO(self._data))

    def crop(self, box: Box, size: tuple[int, int], channels: int) -> np.ndarray:
        """Decode, and resize from the box, bicubic and antialiased: uint8 [size, channels].

        Args:
            box: in pixels of the image the right way up.
            size: height and width of the output.
            channels: 3, or 1 for grayscale.
        """
        width, height = box[2] - box[0], box[3] - box[1]
        most = min(width / size[1], height / size[0]) / SHRINK_MARGIN
        shrinks = self._layout is not None or isinstance(self._image, JpegImageFile)
        shrink = next((factor for factor in (8, 4, 2) if factor <= most), 1) if shrinks else 1
        rows = math.ceil(box[3]) + shrink * reach(height / shrink, size[0])
        pixels = self._decode(rows, channels, shrink)
        shrunk = tuple(-(-side // shrink) for side in self.size)  # decoders round up
        across, down = shrunk[0] / self.size[0], shrunk[1] / self.size[1]
        box = (box[0] * across, box[1] * down, min(box[2] * across, shrunk[0]), min(box[3] * down, shrunk[1]))
        return resize(pixels, box, size)

    def _decode(self, rows: int, channels: int, shrink: int) -> np.ndarray:
        """The pixels the right way up, at least as many of the uppermost rows: uint8 [height, width, channels].

        Args:
            rows: counted before they are shrunk.
            channels: 3, or 1 for grayscale.
            shrink: both sides by 2, 4 or 8, of a JPEG; 1 for the image as it is.
        """
        if self._layout is not None and self._orientation <= 1 and self._layout.components in (1, channels):
            pixels = decode_upper(self._data, self._layout, rows, channels, shrink)
            if pixels is not None:
                return pixels
        image = self._image
        if isinstance(image, JpegImageFile):
            image.draft(None, (image.width // shrink, image.height // shrink))
        if self._orientation > 1:
            image = ImageOps.exif_transpose(image)
        pixels = np.asarray(to_mode(image, "RGB" if channels == 3 else "L"))
        return pixels if channels == 3 else pixels[..., None]


def load_whole(data: bytes, size: tuple[int, int], channels: int, share: float = 1.0) -> np.ndarray:
    """The central part of an image, see `central_crop`, resized to `size`: uint8 [height, width, channels].

    Raises:
        OSError and others of Pillow's: if the bytes cannot be decoded.
    """
    image = EncodedImage(data)
    return image.crop(central_crop(*image.size, size, share), size, channels)


def first_readable(source: Source, count: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """The first images of a source that can be read, whole: uint8 [at most count, height, width, channels].

    Raises:
        UserError: if none of the first ones can be.
    """
    images: list[np.ndarray] = []
    tried = range(min(len(source), READ_TRIES * count))
    for place in tried:
        name = f"record {place}"
        try:
            name, data, _ = source[place]
            images.append(load_whole(data, size, channels))
        except Exception as error:  # decoders raise anything
            logging.warning("cannot show an image that cannot be read: %s (%s)", name, reason(error))
        if len(images) == count:
            break
    require(bool(images), f"none of the first {len(tried)} images can be read, {name} the last; repair or remove them")
    return np.stack(images)


class Unreadable(NamedTuple):
    """A record that cannot be read or decoded, and why."""

    name: str
    reason: str


def reason(error: Exception) -> str:
    """Why an image cannot be read, for people."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return str(error) or type(error).__name__


class Sample(NamedTuple):
    """One training example.

    Attributes:
        image: uint8 [height, width, channels].
        sample_index: global, to which all random draws of this sample belong.
        label: class, or NO_LABEL.
        unreadable: the records that were skipped on the way to this one.
    """

    image: np.ndarray
    sample_index: np.uint32
    label: np.int32
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class LoadCrop:
    """Read a record, crop and augment it at random; a function of (sample index, record) and the seed alone.

    A record that cannot be read or decoded is skipped: the sample draws another from its own generator instead. So the
    other samples stay what they are, and the same run sees the same images on any number of processes.
    """

    source: Source
    seed: int
    size: tuple[int, int]
    channels: int
    area: float
    augment: RandAugment | None = None

    def __call__(self, index: int, record: int) -> Sample:
        """The sample of a global index, from the record that the shuffle gave it."""
        unreadable: list[Unreadable] = []
        rng = sample_rng(self.seed, index)
        place = record
        while len(unreadable) < READ_TRIES:
            name = f"record {place}"
            try:
                name, data, label = self.source[place]
                image = EncodedImage(data)
                box = random_crop(rng, *image.size, self.size, self.area)
                pixels = image.crop(box, self.size, self.channels)
                if self.augment is not None:
                    pixels = self.augment(pixels, rng)
            except Exception as error:  # decoders raise anything, and no file may stop a run
                unreadable.append(Unreadable(name, reason(error)))
                place = rng.randrange(len(self.source))
            else:
                return Sample(pixels, np.uint32(index), np.int32(label), tuple(unreadable))
        return _blank(index, self.size, self.channels, *unreadable)


def _blank(index: int, size: tuple[int, int], channels: int, *unreadable: Unreadable) -> Sample:
    """What stands for an image that is not there: black, and without a label."""
    return Sample(np.zeros((*size, channels), np.uint8), np.uint32(index), np.int32(NO_LABEL), unreadable)


@dataclass(frozen=True)
class LoadWhole:
    """Read a record and take its central crop; blank where it cannot be read, and where there is none.

    Attributes:
        records: by the index of a sample; -1 is none.
    """

    source: Source
    size: tuple[int, int]
    channels: int
    share: float
    records: np.ndarray

    def __call__(self, index: int) -> Sample:
        """The sample of an index."""
        record = int(self.records[index])
        if record < 0:
            return _blank(index, self.size, self.channels)
        name = f"record {record}"
        try:
            name, data, label = self.source[record]
            pixels = load_whole(data, self.size, self.channels, self.share)
        except Exception as error:  # decoders raise anything
            return _blank(index, self.size, self.channels, Unreadable(name, reason(error)))
        return Sample(pixels, np.uint32(index), np.int32(label), ())
