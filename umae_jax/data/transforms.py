"""Choose crops and load samples on the host, as uint8 pixels of one size. Does not import JAX."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from absl import logging
from PIL import UnidentifiedImageError

from umae_jax.data.decode import Box, EncodedImage
from umae_jax.data.sources import NO_LABEL, Record, Source
from umae_jax.errors import UserError, printable, require

CROP_TRIES = 10  # as in torchvision; then the crop is central
READ_TRIES = 32  # unreadable records for one sample before the loader stops the run

T = TypeVar("T")
Labels = tuple[int, str]  # number of classes, and the source's configuration key for error messages


def sample_rng(seed: int, sample_index: int) -> random.Random:
    """Return the random generator of one sample. Python's is five times as fast for scalars as NumPy's."""
    return random.Random(seed << 64 | sample_index)


def random_crop(rng: random.Random, width: int, height: int, size: tuple[int, int], min_area: float) -> Box:
    """Draw the box of a random resized crop (SPEC 10), with 3/4 to 4/3 of the output's aspect ratio.

    Args:
        width, height: size of the image in pixels.
        size: height and width of the output.
        min_area: minimum fraction of the image's area to keep; the maximum is 1.
    """
    aspect = size[1] / size[0]
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1)
        ratio = aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, upper = rng.randrange(width - box_width + 1), rng.randrange(height - box_height + 1)
            return (left, upper, left + box_width, upper + box_height)
    return central_crop(width, height, size)


def central_crop(width: int, height: int, size: tuple[int, int], share: float = 1.0) -> Box:
    """Return the largest central box with the aspect ratio of `size` (height, width), its sides scaled by `share`.

    Resizing this box equals resizing the shorter side and cropping the centre, usually with share 224 / 256 (SPEC 10).
    """
    scale = share * min(width / size[1], height / size[0])
    box_width, box_height = size[1] * scale, size[0] * scale
    left, upper = max(0.0, (width - box_width) / 2), max(0.0, (height - box_height) / 2)  # rounding may fall below 0
    return (left, upper, left + box_width, upper + box_height)


class Unreadable(NamedTuple):
    """A record that cannot be read or decoded: its name, and the reason as a phrase for messages."""

    name: str
    reason: str


class Sample(NamedTuple):
    """Arrays of one sample, without a batch axis, and the records that were skipped for it."""

    arrays: dict[str, np.ndarray]
    unreadable: tuple[Unreadable, ...] = ()


@dataclass(frozen=True)
class LoadCrop:
    """Load a random crop for training: a function of (sample index, record index) and the seed alone.

    The arrays are `image`, uint8 [*size, channels], and, if `labels` is set, `label`, int32 []. A label outside the
    classes raises UserError.

    If a record cannot be read, the sample draws another one from its own generator. Other samples do not change, so a
    run sees the same images on any number of processes. After READ_TRIES unreadable records the image is black.
    """

    source: Source
    seed: int
    size: tuple[int, int]  # height and width of the crops
    channels: int  # 3 for RGB, 1 for grayscale
    min_area: float  # minimum fraction of an image's area that a crop keeps
    augment: Callable[[np.ndarray, random.Random], np.ndarray] | None = None  # draws from the sample's generator
    labels: Labels | None = None  # None for no label

    def __call__(self, sample_index: int, record_index: int) -> Sample:
        """Load a sample, given its index and the index of its record."""
        rng = sample_rng(self.seed, sample_index)

        def load(data: bytes) -> np.ndarray:
            image = _open(self.source, data)
            box = random_crop(rng, *image.size, self.size, self.min_area)
            pixels = image.crop(box, self.size, self.channels)
            return pixels if self.augment is None else self.augment(pixels, rng)

        unreadable: list[Unreadable] = []
        while len(unreadable) < READ_TRIES:
            loaded = try_load(self.source, record_index, load)
            if not isinstance(loaded, Unreadable):
                return Sample(_arrays(*loaded, self.labels), tuple(unreadable))
            unreadable.append(loaded)
            record_index = rng.randrange(len(self.source))
        return Sample(_blank(self.size, self.channels, self.labels), tuple(unreadable))


@dataclass(frozen=True)
class LoadCentralCrop:
    """Load the central crop of a record for evaluation; see `LoadCrop` for arrays and attributes.

    If the record cannot be read, or its index is -1, the image is black and the label is NO_LABEL.
    """

    source: Source
    size: tuple[int, int]
    channels: int
    share: float = 1.0  # fraction of the sides of the largest central crop to keep, `crop_pct` in timm
    labels: Labels | None = None

    def __call__(self, record_index: int) -> Sample:
        """Load a record."""
        if record_index < 0:
            return Sample(_blank(self.size, self.channels, self.labels))
        loaded = self.try_load(record_index)
        if isinstance(loaded, Unreadable):
            return Sample(_blank(self.size, self.channels, self.labels), (loaded,))
        return Sample(_arrays(*loaded, self.labels))

    def try_load(self, record_index: int) -> tuple[Record, np.ndarray] | Unreadable:
        """Load a record and its pixels, uint8 [*size, channels], without checking the label."""

        def decode(data: bytes) -> np.ndarray:
            image = _open(self.source, data)
            return image.crop(central_crop(*image.size, self.size, self.share), self.size, self.channels)

        return try_load(self.source, record_index, decode)


def first_readable(source: Source, count: int, size: tuple[int, int], channels: int) -> np.ndarray:
    """Load the central crops of the first readable images: uint8 [count or fewer, *size, channels].

    If none of the first READ_TRIES * count images can be read, raise a UserError.
    """
    load = LoadCentralCrop(source, size, channels)
    images: list[np.ndarray] = []
    tries = min(len(source), READ_TRIES * count)
    for index in range(tries):
        loaded = load.try_load(index)
        if isinstance(loaded, Unreadable):
            logging.warning("skipped an image that cannot be read: %s (%s)", *loaded)
        else:
            images.append(loaded[1])
        if len(images) == count:
            break
    require(bool(images), f"none of the first {tries} images can be read, up to {loaded[0]}; repair or remove them")
    return np.stack(images)


def _open(source: Source, data: bytes) -> EncodedImage:
    return EncodedImage(data, getattr(source, "max_pixels", None))  # sources of other packages may lack it


def try_load(source: Source, index: int, decode: Callable[[bytes], T]) -> tuple[Record, T] | Unreadable:
    """Load a record and what `decode` returns for its data.

    Catches every exception, because one bad file must not stop a run.
    """
    name = f"record {index}"
    try:
        record = source[index]
        name = record.name
        return record, decode(record.data)
    except UnidentifiedImageError:
        return Unreadable(name, "not an image that Pillow can read")
    except Exception as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            return Unreadable(printable(os.fsdecode(error.filename)), error.strerror)
        return Unreadable(name, str(error) or type(error).__name__)


def _arrays(record: Record, pixels: np.ndarray, labels: Labels | None) -> dict[str, np.ndarray]:
    """Check the label of a record, and return the arrays of its sample."""
    if labels is None:
        return {"image": pixels}
    classes, key = labels
    if not 0 <= record.label < classes:
        value = "no label" if record.label == NO_LABEL else f"label {record.label}"
        raise UserError(
            f"{key}: {record.name} has {value}, but labels must lie in 0..{classes - 1}; "
            "choose a split or folder whose images all have such labels"
        )
    return {"image": pixels, "label": np.array(record.label, np.int32)}


def _blank(size: tuple[int, int], channels: int, labels: Labels | None) -> dict[str, np.ndarray]:
    image = {"image": np.zeros((*size, channels), np.uint8)}
    return image if labels is None else {**image, "label": np.array(NO_LABEL, np.int32)}
