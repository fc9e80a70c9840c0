"""Annotated images for detection: COCO's JSON files, or a TFDS data set with boxes (DET 1.1). Does not import JAX.

`open_annotated` returns an `AnnotatedSource`: image files, not decoded, and their objects as compact arrays.
"""

import contextlib
import copy
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from umae_jax.data.coco_json import LeftOut, Tables, check, parse, read_coco
from umae_jax.data.decode import EncodedImage
from umae_jax.data.instances import Instances
from umae_jax.data.sources import FILE_NAME, NO_LABEL, ImageFiles, Record, open_source
from umae_jax.errors import MissingDataError, UserError, printable, require
from umae_jax.files import AnyPath, files_in_bucket, in_bucket, locate, read_file

MIN_IMAGE_SIDE = 32  # pixels; smaller images do not train
SPLITS = ("train", "val")
KINDS = "coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME"
TFDS_FILE_NAME = "image/filename"

# Reasons for leaving an image out.
MISSING = "images that do not exist"
EMPTY = "images without objects"
SMALL = f"images below {MIN_IMAGE_SIDE} pixels"


class Files(Protocol):
    """Image files by the number of their row. Must be picklable."""

    def name(self, row: int) -> str:
        """Return the name of an image for messages."""

    def read(self, row: int) -> bytes:
        """Return the contents of an image file."""


class ImageFolder(NamedTuple):
    """Image files in a folder, local or in a bucket."""

    folder: str
    names: np.ndarray  # bytes [images]

    def name(self, row: int) -> str:
        """See `Files`."""
        return os.path.join(self.folder, os.fsdecode(self.names[row]))

    def read(self, row: int) -> bytes:
        """See `Files`."""
        return read_file(self.name(row))


class TfdsFiles(NamedTuple):
    """The images of a prepared TFDS data set."""

    data: Any  # from `as_data_source`, with decoding skipped
    image: str  # name of the image feature
    names: np.ndarray  # bytes [images]

    def name(self, row: int) -> str:
        """See `Files`."""
        return f"record {row} {os.fsdecode(self.names[row])}".strip()

    def read(self, row: int) -> bytes:
        """See `Files`."""
        return self.data[row][self.image]


class AnnotatedSource:
    """Images with the boxes and masks of their objects; also a `Source` of images without labels.

    Attributes:
        classes: printable names of the categories, in the order of their ids.
        category_ids: ids of the categories in the annotations, ascending, int64 [classes].
        left_out: number and first example of what was left out, by reason.
        summary: number of images, objects and classes, and what was left out.
        max_pixels: that an image may have; see `EncodedImage`.
        rows: of the images in the tables, int64 [N].
        exif: turn images as their Exif data says; annotations refer to the stored pixels.
    """

    exif = False

    def __init__(
        self,
        tables: Tables,
        files: Files,
        categories: dict[int, str],
        left_out: LeftOut,
        place: str,
        read_annotations: Callable[[], dict[str, Any]],
        max_pixels: int | None = None,
    ) -> None:
        self._tables, self._files, self._read_annotations, self._place = tables, files, read_annotations, place
        self.classes = tuple(map(printable, categories.values()))
        self.category_ids = np.array([*categories], np.int64)
        self.left_out, self.max_pixels = left_out, max_pixels
        self.rows = np.arange(len(tables.image_ids))
        self.summary = self._summarize()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self.rows[index])
        return Record(printable(self._files.name(row)), self._files.read(row), NO_LABEL)

    def file_name(self, index: int) -> str:
        """Return the name of an image in the annotations."""
        return os.fsdecode(self._tables.names[self.rows[index]])

    def decode(self, data: bytes) -> np.ndarray:
        """Decode the whole image of a record, uint8 [H, W, 3]."""
        image = EncodedImage(data, self.max_pixels, exif=self.exif)
        return image.crop((0, 0, *image.size), image.size[::-1], 3, "bilinear")

    def instances(self, index: int) -> Instances:
        """Return the objects of an image, without decoding their masks."""
        tables, row = self._tables, self.rows[index]
        objects = slice(int(tables.first[row]), int(tables.first[row + 1]))
        return Instances(tables.boxes[objects], tables.labels[objects], tuple(tables.masks(objects)))

    @property
    def image_ids(self) -> np.ndarray:
        """Ids of the images in the annotations, int64 [N]."""
        return self._tables.image_ids[self.rows]

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of the images by the annotations, int32 [N, 2]; files of other sizes are not read."""
        return self._tables.sizes[self.rows]

    @functools.cached_property
    def portrait(self) -> np.ndarray:
        """Flags of the images that are higher than wide, bool [N]; the others are landscape."""
        return self.sizes[:, 0] > self.sizes[:, 1]

    @property
    def has_masks(self) -> bool:
        """Return whether any object has a mask."""
        return self._tables.has_masks

    @property
    def object_counts(self) -> np.ndarray:
        """Number of objects of each image, int64 [N]."""
        return np.diff(self._tables.first)[self.rows]

    @property
    def objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes, float32 [objects, 4], and labels, int32 [objects], of all images."""
        chosen = np.zeros(len(self._tables.image_ids), bool)
        chosen[self.rows] = True
        chosen = np.repeat(chosen, np.diff(self._tables.first))
        return self._tables.boxes[chosen], self._tables.labels[chosen]

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the images' names and objects, which a run that continues compares."""
        tables = self._tables
        digest = hashlib.sha256()
        for array in (self.rows, tables.image_ids, tables.first, tables.boxes, tables.labels):
            digest.update(np.ascontiguousarray(array).data)
        for name in tables.names:
            digest.update(b"\0" + name)
        return digest.hexdigest()[:16]

    def _summarize(self) -> str:
        count, masks = int(self.object_counts.sum()), "masks and boxes" if self.has_masks else "boxes, no masks"
        classes = f"{len(self.classes):,} class{'es'[: 2 * (len(self.classes) > 1)]}"
        text = f"{len(self):,} image{'s'[: len(self) > 1]} with {count:,} objects of {classes} ({masks})"
        return f"{self._place}: {text}" + (f"; left out: {self.describe_left_out()}" if self.left_out else "")

    def describe_left_out(self) -> str:
        """Return the counts and first examples of what was left out, as a phrase."""
        return ", ".join(f"{count:,} {reason} (first {first})" for reason, (count, first) in self.left_out.items())

    def select(self, indices: np.ndarray, left_out: LeftOut | None = None) -> "AnnotatedSource":
        """Return a source of some of the images, int [n], which shares the arrays of this one.

        Args:
            indices: of the images.
            left_out: what this selection leaves out, for the summary.
        """
        chosen = copy.copy(self)
        for name in ("portrait", "digest"):  # cached, of other images
            chosen.__dict__.pop(name, None)
        chosen.rows, chosen.left_out = self.rows[indices], self.left_out | (left_out or {})
        chosen.summary = chosen._summarize()
        return chosen

    def for_training(self) -> "AnnotatedSource":
        """Return a source without the images that cannot train: those without objects, and small ones.

        Raises:
            UserError: if no image remains.
        """
        empty, small = self.object_counts == 0, self.sizes.min(1) < MIN_IMAGE_SIDE
        left_out = {
            reason: (int(flags.sum()), printable(self.file_name(int(np.argmax(flags)))))
            for reason, flags in ((EMPTY, empty), (SMALL, small & ~empty))
            if flags.any()
        }
        chosen = self.select(np.flatnonzero(~empty & ~small), left_out)
        require(
            len(chosen) > 0,
            f"{self._place}: none of its {len(self):,} images can train, because all of them have no objects or sides "
            f"below {MIN_IMAGE_SIDE} pixels; choose other annotations",
        )
        return chosen

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's format for evaluation, crowd regions included.

        They are read anew, because only evaluation needs them.
        """
        annotations = self._read_annotations()
        ids = set(self.image_ids.tolist())
        return {
            "images": [image for image in annotations["images"] if image["id"] in ids],
            "annotations": [entry for entry in annotations["annotations"] if entry["image_id"] in ids],
            "categories": annotations["categories"],
        }


def open_annotated(
    name: str, *, split: str = "train", key: str = "data", data_dir: str | None = None, max_pixels: int | None = None
) -> AnnotatedSource:
    """Open `coco:FOLDER`, `coco:ANNOTATIONS.json@IMAGES` or `tfds:NAME`.

    A folder has COCO's layout, annotations/instances_SPLIT2017.json and SPLIT2017/, or annotations_SPLIT.json and
    images/. All images are returned, also those without objects; `for_training` leaves them out.

    Args:
        name: value of `data.source` or `validation.source`.
        split: train or val, of a folder or a TFDS data set.
        key: section of the configuration, for error messages; "--" if flags give the values.
        data_dir: directory of TFDS data sets; None for TFDS's default.
        max_pixels: that an image may have; see `EncodedImage`.

    Raises:
        UserError: naming the file, and the annotation, that is wrong.
    """
    prefix = key if key == "--" else f"{key}."
    key = f"{prefix}source"  # from here on, the key or flag of the source
    kind, _, rest = name.partition(":")
    if kind == "tfds" and rest:
        return _open_tfds(rest, split, prefix, data_dir, max_pixels)
    require(kind == "coco" and bool(rest), f"{key}: unknown source {name!r}; write {KINDS}")
    annotations, images = _find(rest, split, prefix)
    read = functools.partial(read_coco, str(annotations), key)
    found = parse(read(), str(annotations), key)
    names = found.tables.names
    exists = _existing(images, [os.fsdecode(name) for name in names])
    if not exists.all():
        first = printable(os.fsdecode(names[int(np.argmin(exists))]))
        require(
            bool(exists.any()),
            f"{key}: none of the {len(names):,} images of {annotations} exists in {images}, such as {first}; "
            "write coco:ANNOTATIONS.json@IMAGES with the folder of the images",
        )
        found.left_out[MISSING] = (int((~exists).sum()), first)
    place = f"{key}: {printable(str(annotations))}"
    files = ImageFolder(str(images), names)
    source = AnnotatedSource(found.tables, files, found.categories, found.left_out, place, read, max_pixels)
    return source if exists.all() else source.select(np.flatnonzero(exists))


def _find(rest: str, split: str, prefix: str) -> tuple[AnyPath, AnyPath]:
    """Return the paths of the annotations and of the folder of images that `coco:REST` names."""
    key = f"{prefix}source"
    json_path, separator, images = rest.rpartition("@")
    if separator and json_path.endswith(".json"):
        annotations, folder = locate(json_path, key), locate(images, key)
        if not annotations.is_file():
            raise MissingDataError(f"{key}: there is no file {printable(json_path)}; write {KINDS}", key)
        require(folder.is_dir(), f"{key}: there is no folder {printable(images)} of images; write {KINDS}")
        return annotations, folder
    message = f"{key}: coco:{printable(rest)} lacks the folder of images; write {KINDS}"
    require(not rest.endswith(".json"), message)
    require(split in SPLITS, f"{prefix}split: {split!r} is no split of coco:FOLDER; choose {' or '.join(SPLITS)}")
    root = locate(rest, key)
    if not root.is_dir():
        raise MissingDataError(f"{key}: there is no folder {printable(rest)}; write {KINDS}", key)
    layouts = (
        (root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"),
        (root / f"annotations_{split}.json", root / "images"),
    )
    for annotations, folder in layouts:
        if annotations.is_file():
            require(folder.is_dir(), f"{key}: {annotations} has no folder of images {folder}; write {KINDS}")
            return annotations, folder
    names = " nor ".join(str(annotations.relative_to(root)) for annotations, _ in layouts)
    raise UserError(f"{key}: there is neither {names} in {printable(rest)}; write {KINDS}")


def _existing(folder: AnyPath, names: Sequence[str]) -> np.ndarray:
    """Return which files exist, bool [names]; lists each directory once, as COCO has 100,000s of files."""
    if in_bucket(folder):
        prefix = f"{folder}/"
        files = {file.removeprefix(prefix) for file in files_in_bucket(folder)}
        return np.array([name in files for name in names], bool)
    listed: dict[str, set[str]] = {}
    exists = np.zeros(len(names), bool)
    for index, name in enumerate(names):
        parent, _, file = name.rpartition("/")
        if parent not in listed:
            path = os.path.join(str(folder), parent)
            listed[parent] = set(os.listdir(path)) if os.path.isdir(path) else set()
        exists[index] = file in listed[parent]
    return exists


def _open_tfds(name: str, split: str, prefix: str, data_dir: str | None, max_pixels: int | None) -> AnnotatedSource:
    """Open a TFDS data set with the features of coco/2017; its records are read once for sizes and boxes."""
    split = {"val": "validation"}.get(split, split)
    section = "data" if prefix == "--" else prefix.removesuffix(".")
    images: Any = open_source(f"tfds:{name}", split=split, key=section, data_dir=data_dir)
    key = f"{prefix}source"
    features = dict(images.data.dataset_info.features.items())
    objects = dict(getattr(getattr(features.get("objects"), "feature", None), "items", dict)())
    names = getattr(objects.get("label"), "names", None)
    message = f"{key}: tfds:{name} has no feature objects with bbox and label; choose coco/2017 or {KINDS}"
    require("bbox" in objects and names is not None, message)
    read = functools.partial(_tfds_annotations, images.data, images.image, tuple(names or ()))
    annotations = read()
    found = parse(check(annotations, name, key), name, key)
    place = f"{key}: tfds:{name} (TFDS stores no masks)"
    files = TfdsFiles(images.data, images.image, found.tables.names)
    return AnnotatedSource(found.tables, files, found.categories, found.left_out, place, read, max_pixels)


def _tfds_annotations(data: Any, image: str, classes: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401 - TFDS's
    """Return the annotations of a TFDS data set in COCO's format; the id of a category is its label + 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(len(data)):
        record = data[number]
        try:
            width, height = EncodedImage(record[image], exif=False).size
        except Exception:  # an unreadable image is reported when it is loaded
            width, height = 1, 1
        name = record.get(TFDS_FILE_NAME, record.get(FILE_NAME, b""))
        name = name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
        image_id = int(record.get("image/id", number))
        images.append({"id": image_id, "file_name": name or str(number), "height": height, "width": width})
        objects = record["objects"]
        boxes = np.asarray(objects["bbox"], np.float64).reshape(-1, 4) * [height, width, height, width]
        for index, (y1, x1, y2, x2) in enumerate(boxes.tolist()):
            entry = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": int(objects["label"][index]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(objects["area"][index]) if "area" in objects else (x2 - x1) * (y2 - y1),
                "iscrowd": int(objects["is_crowd"][index]) if "is_crowd" in objects else 0,
            }
            annotations.append(entry)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def without_annotations(images: ImageFiles) -> AnnotatedSource:
    """Return image files as a source without objects or classes; photographs are turned as their Exif data says."""
    count, sizes = len(images), np.ones((len(images), 2), np.int32)
    for index in range(count):
        with contextlib.suppress(Exception):  # a file that cannot be read is reported when it is loaded
            sizes[index] = EncodedImage(images[index].data, images.max_pixels).size[::-1]
    none = np.zeros(0)
    tables = Tables(
        image_ids=np.arange(count),
        names=images.names,
        sizes=sizes,
        first=np.zeros(count + 1, np.int64),
        boxes=none.reshape(0, 4).astype(np.float32),
        labels=none.astype(np.int32),
        mask_kinds=none.astype(np.uint8),
        mask_first=np.zeros(1, np.int64),
        mask_data=none.astype(np.uint8),
    )
    source = AnnotatedSource(tables, ImageFolder(images.folder, images.names), {}, {}, "--images", dict)
    source.exif, source.max_pixels = True, images.max_pixels
    return source
