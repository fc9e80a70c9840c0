"""Load images with their objects on the host, in canvases of a few fixed sizes (DET 1.1, 5). Does not import JAX.

The image lies in the upper left corner of its canvas, the rest is 0. Images are resized by a bilinear filter, which
antialiases when it reduces them; semantic maps by the nearest pixel. Masks stay at the resolution of the image file and
leave as crops of their boxes. Pixels are those stored in the file: COCO's annotations ignore the Exif orientation.
"""

import functools
import io
import os
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from umae_jax.data.annotations import AnnotatedSource
from umae_jax.data.copy_paste import Layer, blend
from umae_jax.data.decode import EncodedImage
from umae_jax.data.instances import CROP_SIZE, crop_mask, rasterize
from umae_jax.data.placement import Canvas, Placement, Size, choose_canvas, fit, oriented, scaled
from umae_jax.data.transforms import READ_TRIES, Sample, Unreadable, sample_rng, try_load
from umae_jax.errors import require
from umae_jax.files import read_file

MAX_BOXES = 100  # per image
MIN_SIDE = 0.01  # pixels; boxes that are smaller inside the canvas are dropped
FLIP_PROBABILITY = 0.5
IGNORED = 255  # in semantic maps
SEMANTIC_STRIDE = 8


@dataclass(frozen=True)
class LoadInstances:
    """Load an image and its objects for training: a function of (sample index, record index) and the seed alone.

    All images of a batch share a canvas, so they must have one orientation, that of `source.portrait`. The canvas is
    drawn from the seed and the number of the batch, everything else from the sample's own generator.

    The arrays are `image`, uint8 [H, W, 3]; `image_size`, int32 [2], height and width of the content; `boxes`, float32
    [G, 4], x1 y1 x2 y2 in its pixels; `labels`, int32 [G]; `box_valid`, bool [G]; `masks`, uint8 [G, 112, 112], the
    coverage of each box by its mask from 0 to 255; `mask_valid`, bool [G]; and, with `semantic_folder`, `semantic`,
    uint8 [H / 8, W / 8], IGNORED in the padding. Of more than G = MAX_BOXES objects a random choice remains.

    If a record cannot be read, the sample draws another one of the same orientation from its own generator. After
    READ_TRIES of them the image is black and has no objects.

    `umae_jax.tasks.annotated` checks canvases and ranges.

    Raises:
        UserError: if objects without masks would be pasted.
    """

    source: AnnotatedSource
    seed: int
    batch_size: int  # global; sample i belongs to batch i // batch_size
    canvases: tuple[Size, ...]  # see `choose_canvas`
    short_edge: tuple[int, int]  # range from which the length of the shorter side is drawn, in pixels
    long_edge: int  # maximum length of the longer side, in pixels
    jitter: tuple[float, float] | None = None  # range of large-scale jitter relative to the canvas, which ignores edges
    copy_paste: float = 0.0  # probability of pasting objects of another image
    semantic_folder: str | None = None  # of PNG files with a class per pixel, named like the images

    def __post_init__(self) -> None:
        message = f"copy_paste: {self.copy_paste} needs masks, but the annotations have boxes only; set it to 0"
        require(not self.copy_paste or self.source.has_masks, message)

    def __call__(self, sample_index: int, record_index: int) -> Sample:
        """Load a sample, given its index and the index of its record."""
        rng = sample_rng(self.seed, sample_index)
        portrait = bool(self.source.portrait[record_index])
        canvas = choose_canvas(self.seed, sample_index // self.batch_size, self.canvases, self.short_edge)
        canvas = canvas._replace(size=oriented(canvas.size, portrait))
        unreadable: list[Unreadable] = []
        layer = self._load(rng, record_index, canvas, unreadable)
        if layer is not None and self.copy_paste and rng.random() < self.copy_paste:
            other = self._load(rng, self._draw(rng, portrait), canvas, unreadable)
            if other is not None:
                layer = _limit(blend(layer, other, rng, IGNORED, SEMANTIC_STRIDE), rng)
        if layer is None:
            return Sample(blank_arrays(canvas.size, semantic=self.semantic_folder is not None), tuple(unreadable))
        arrays = _arrays(layer, canvas.size)
        return Sample(arrays, tuple(unreadable))

    def _load(
        self, rng: random.Random, record_index: int, canvas: Canvas, unreadable: list[Unreadable]
    ) -> Layer | None:
        """Load a record or, if it cannot be read, another one; None after READ_TRIES."""
        portrait = bool(self.source.portrait[record_index])
        while len(unreadable) < READ_TRIES:
            loaded = try_load(self.source, record_index, functools.partial(self._decode, rng, record_index, canvas))
            if not isinstance(loaded, Unreadable):
                return loaded[1]
            unreadable.append(loaded)
            record_index = self._draw(rng, portrait)
        return None

    def _draw(self, rng: random.Random, portrait: bool) -> int:
        """Draw a record of an orientation."""
        return int(rng.choice(self._by_orientation[portrait]))

    @functools.cached_property
    def _by_orientation(self) -> tuple[np.ndarray, np.ndarray]:
        """Records of landscape and of portrait images."""
        return np.flatnonzero(~self.source.portrait), np.flatnonzero(self.source.portrait)

    def _decode(self, rng: random.Random, record_index: int, canvas: Canvas, data: bytes) -> Layer:
        """Decode an image and the masks of its objects, and place them in the canvas."""
        image = EncodedImage(data, self.source.max_pixels, exif=False)
        size = image.size[::-1]
        check_size(self.source, record_index, size)
        placement = self._place(rng, size, canvas)
        boxes, labels, masks = self.source.instances(record_index)
        boxes = placement.to_content(boxes)
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(1) >= MIN_SIDE)
        if len(kept) > MAX_BOXES:
            kept = np.array(sorted(rng.sample(kept.tolist(), MAX_BOXES)))
        drawn = [masks[index] for index in kept]
        regions = tuple(None if mask is None else rasterize(mask, *size) for mask in drawn)
        semantic = self._semantic(record_index, placement) if self.semantic_folder is not None else None
        return Layer(placement.pixels(image), boxes[kept], labels[kept], regions, placement, semantic)

    def _place(self, rng: random.Random, size: Size, canvas: Canvas) -> Placement:
        """Draw size, crop and flip of an image."""
        offset = (0, 0)
        if self.jitter is None:
            content = resized = fit(size, rng.randint(canvas.low, canvas.high), self.long_edge, canvas.size)
        else:
            fitting = min(canvas.size[0] / size[0], canvas.size[1] / size[1])
            resized = scaled(size, rng.uniform(*self.jitter) * fitting)
            content = (min(resized[0], canvas.size[0]), min(resized[1], canvas.size[1]))
            offset = (rng.randint(0, resized[0] - content[0]), rng.randint(0, resized[1] - content[1]))
        return Placement(size, resized, offset, content, rng.random() < FLIP_PROBABILITY)

    def _semantic(self, record_index: int, placement: Placement) -> np.ndarray:
        """Read the upper left pixel of every block of 8 x 8 pixels of a semantic map, uint8."""
        labels = read_semantic(str(self.semantic_folder), semantic_name(self.source, record_index))
        if labels.shape != placement.source or labels.dtype != np.uint8:
            shape, wanted = list(labels.shape), list(placement.source)
            raise ValueError(f"its semantic map is {shape}, {labels.dtype}, not {wanted}, uint8")
        return labels[np.ix_(placement.rows[::SEMANTIC_STRIDE], placement.columns[::SEMANTIC_STRIDE])]


@dataclass(frozen=True)
class LoadForDetection:
    """Load an image for evaluation, resized once and not flipped.

    The arrays are `image`, uint8 [H, W, 3], and `image_size`, as for `LoadInstances`; `original_size`, int32 [2],
    height and width of the image file; `record`, int32 [], the index of the record.

    If the record cannot be read, or its index is -1, the image is black and has no size.
    """

    source: AnnotatedSource
    canvas: Size  # height and width; images that do not fit are reduced further
    short_edge: int  # length of the shorter side, in pixels
    long_edge: int  # maximum length of the longer side, in pixels

    def __call__(self, record_index: int) -> Sample:
        """Load a record."""
        arrays: dict[str, np.ndarray] = {
            "image": np.zeros((*self.canvas, 3), np.uint8),
            "image_size": np.zeros(2, np.int32),
            "original_size": np.zeros(2, np.int32),
            "record": np.array(record_index, np.int32),
        }
        if record_index < 0:
            return Sample(arrays)

        def decode(data: bytes) -> tuple[np.ndarray, Size]:
            image = EncodedImage(data, self.source.max_pixels, exif=self.source.exif)
            size = image.size[::-1]
            check_size(self.source, record_index, size)
            resized = fit(size, self.short_edge, self.long_edge, self.canvas)
            return Placement(size, resized, content=resized).pixels(image), size

        loaded = try_load(self.source, record_index, decode)
        if isinstance(loaded, Unreadable):
            return Sample(arrays, (loaded,))
        pixels, size = loaded[1]
        arrays["image"][: pixels.shape[0], : pixels.shape[1]] = pixels
        arrays["image_size"][:], arrays["original_size"][:] = pixels.shape[:2], size
        return Sample(arrays)


def view_names(number: int) -> tuple[str, str]:
    """Return the names of the image and of its size in a view of `LoadViews`, counted from 0."""
    suffix = f"_{number}" if number else ""
    return f"image{suffix}", f"image_size{suffix}"


@dataclass(frozen=True)
class LoadViews:
    """Load an image in several sizes: arrays of the first loader, and `image_1`, `image_size_1`, ... of the rest."""

    loaders: tuple[LoadForDetection, ...]

    def __call__(self, record_index: int) -> Sample:
        """Load a record."""
        first, *others = (load(record_index) for load in self.loaders)
        arrays = dict(first.arrays)
        for number, sample in enumerate(others, 1):
            image, image_size = view_names(number)
            arrays |= {image: sample.arrays["image"], image_size: sample.arrays["image_size"]}
        return Sample(arrays, first.unreadable)


def check_size(source: AnnotatedSource, record_index: int, size: Size) -> None:
    """Raise a ValueError if an image has another height and width than its annotations say."""
    height, width = source.sizes[record_index].tolist()
    if size != (height, width):
        raise ValueError(f"it has {size[1]} x {size[0]} pixels, but its annotations say {width} x {height}")


def _limit(layer: Layer, rng: random.Random) -> Layer:
    """Keep MAX_BOXES objects at random."""
    count = len(layer.boxes)
    return layer if count <= MAX_BOXES else layer.take(np.array(sorted(rng.sample(range(count), MAX_BOXES))))


def semantic_name(source: AnnotatedSource, record_index: int) -> str:
    """Return the name of the semantic map of an image."""
    return os.path.splitext(source.file_name(record_index))[0] + ".png"


def read_semantic(folder: str, name: str) -> np.ndarray:
    """Read a semantic map as it is stored; an OSError if it is no PNG file."""
    return np.asarray(Image.open(io.BytesIO(read_file(os.path.join(folder, name))), formats=["PNG"]))


def blank_arrays(size: Size, *, semantic: bool) -> dict[str, np.ndarray]:
    """Return the arrays of `LoadInstances` for a black canvas without objects."""
    arrays: dict[str, np.ndarray] = {
        "image": np.zeros((*size, 3), np.uint8),
        "image_size": np.array(size, np.int32),
        "boxes": np.zeros((MAX_BOXES, 4), np.float32),
        "labels": np.zeros(MAX_BOXES, np.int32),
        "box_valid": np.zeros(MAX_BOXES, bool),
        "masks": np.zeros((MAX_BOXES, CROP_SIZE, CROP_SIZE), np.uint8),
        "mask_valid": np.zeros(MAX_BOXES, bool),
    }
    if semantic:
        arrays["semantic"] = np.full((size[0] // SEMANTIC_STRIDE, size[1] // SEMANTIC_STRIDE), IGNORED, np.uint8)
    return arrays


def _arrays(layer: Layer, size: Size) -> dict[str, np.ndarray]:
    """Return the arrays of a sample; objects whose masks lie outside of the content are dropped."""
    arrays = blank_arrays(size, semantic=layer.semantic is not None)
    height, width = layer.placement.content
    arrays["image"][:height, :width] = layer.pixels
    arrays["image_size"][:] = height, width
    if layer.semantic is not None:
        rows, columns = layer.semantic.shape
        arrays["semantic"][:rows, :columns] = layer.semantic
    sources = layer.placement.to_source(layer.boxes)
    count = 0
    for box, label, mask, source in zip(layer.boxes, layer.labels, layer.masks, sources, strict=True):
        if mask is not None:
            crop = crop_mask(mask, source, *layer.placement.source)
            if not crop.any():
                continue
            arrays["masks"][count] = crop[:, ::-1] if layer.placement.flip else crop
            arrays["mask_valid"][count] = True
        arrays["boxes"][count], arrays["labels"][count], arrays["box_valid"][count] = box, label, True
        count += 1
    return arrays
