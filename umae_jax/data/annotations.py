"""Annotated images for detection: COCO's JSON files, or a TFDS data set with boxes (DET 1.1). Does not import JAX.

`open_annotated` returns an `AnnotatedSource`: image files, not decoded, and their objects as compact arrays.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from umae_jax.data.decode import EncodedImage
from umae_jax.data.instances import Instances, Mask, Polygons, RunLengths, mask_api
from umae_jax.data.sources import FILE_NAME, NO_LABEL, ImageFiles, Record, open_source
from umae_jax.errors import UserError, printable, require, shorten
from umae_jax.files import AnyPath, files_in_bucket, in_bucket, locate, read_file

MIN_IMAGE_SIDE = 32  # pixels; smaller images do not train
MIN_POLYGON = 6  # numbers, which are three points
SPLITS = ("train", "val")
KINDS = "coco:FOLDER, coco:ANNOTATIONS.json@IMAGES or tfds:NAME"
TFDS_FILE_NAME = "image/filename"

# Reasons for leaving something out.
CROWD = "crowd regions"
IGNORED = "objects marked as ignored"
NO_AREA = "boxes without area or with sides below 1 pixel"
NOT_FINITE = "boxes that are not finite"
OUTSIDE = "boxes outside of their image"
POLYGON = "polygons without three points"
UNKNOWN_CATEGORY = "objects of unknown categories"
UNKNOWN_IMAGE = "objects of unknown images"
MISSING = "images that do not exist"
EMPTY = "images without objects"
SMALL = f"images below {MIN_IMAGE_SIDE} pixels"

_NO_MASK, _POLYGONS, _RUN_LENGTHS = range(3)

LeftOut = dict[str, tuple[int, str]]  # number and first example, by reason


class Files(Protocol):
    """Image files by the number of their row. Must be picklable."""

    def name(self, row: int) -> str:
        """Return the name of an image for messages."""

    def read(self, row: int) -> bytes:
        """Return the contents of an image file."""


class Tables(NamedTuple):
    """Images and their objects as arrays: the objects of image i are rows first[i] to first[i + 1]."""

    image_ids: np.ndarray  # of the file, int64 [images]
    names: np.ndarray  # of the image files, bytes [images]
    sizes: np.ndarray  # height and width by the annotations, int32 [images, 2]
    first: np.ndarray  # int64 [images + 1]
    boxes: np.ndarray  # x1 y1 x2 y2 in pixels, float32 [objects, 4]
    labels: np.ndarray  # indices of classes, int32 [objects]
    mask_kinds: np.ndarray  # uint8 [objects]
    mask_first: np.ndarray  # offsets into `mask_data`, int64 [objects + 1]
    mask_data: np.ndarray  # uint8 [bytes]


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

    def instances(self, index: int) -> Instances:
        """Return the objects of an image, without decoding their masks."""
        tables, row = self._tables, self.rows[index]
        objects = slice(int(tables.first[row]), int(tables.first[row + 1]))
        masks = tuple(map(self._mask, range(objects.start, objects.stop)))
        return Instances(tables.boxes[objects], tables.labels[objects], masks)

    def _mask(self, number: int) -> Mask | None:
        tables = self._tables
        data = tables.mask_data[tables.mask_first[number] : tables.mask_first[number + 1]]
        if tables.mask_kinds[number] == _NO_MASK:
            return None
        if tables.mask_kinds[number] == _RUN_LENGTHS:
            return RunLengths(data.tobytes())
        words = data.view(np.int32)
        lengths = words[1 : 1 + words[0]]
        points = data.view(np.float32)[1 + words[0] :]
        return Polygons(tuple(np.split(points, np.cumsum(lengths)[:-1])))

    @property
    def image_ids(self) -> np.ndarray:
        """Ids of the images in the annotations, int64 [N]."""
        return self._tables.image_ids[self.rows]

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of the images by the annotations, int32 [N, 2]; the file's own are those that count."""
        return self._tables.sizes[self.rows]

    @functools.cached_property
    def portrait(self) -> np.ndarray:
        """Flags of the images that are higher than wide, bool [N]; the others are landscape."""
        return self.sizes[:, 0] > self.sizes[:, 1]

    @property
    def has_masks(self) -> bool:
        """Whether any object has a mask."""
        return bool(self._tables.mask_kinds.any())

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
        """Return the images, annotations and categories of COCO's format for evaluation, crowd regions included.

        They are read anew, because only evaluation needs them.
        """
        annotations = self._read_annotations()
        ids = set(self.image_ids.tolist())
        return {
            "info": {},
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
    read = functools.partial(_read_json, str(annotations), key)
    found = _parse(read(), str(annotations), key)
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
        require(annotations.is_file(), f"{key}: there is no file {printable(json_path)}; write {KINDS}")
        require(folder.is_dir(), f"{key}: there is no folder {printable(images)} of images; write {KINDS}")
        return annotations, folder
    message = f"{key}: coco:{printable(rest)} lacks the folder of images; write {KINDS}"
    require(not rest.endswith(".json"), message)
    require(split in SPLITS, f"{prefix}split: {split!r} is no split of coco:FOLDER; choose {' or '.join(SPLITS)}")
    root = locate(rest, key)
    require(root.is_dir(), f"{key}: there is no folder {printable(rest)}; write {KINDS}")
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


def _read_json(path: str, key: str) -> dict[str, Any]:
    """Read a file of COCO annotations and check its outermost structure."""
    try:
        read = json.loads(read_file(path))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{key}: {printable(path)} is not JSON ({error}); choose COCO annotations") from None
    return _check(read, path, key)


def _check(read: Any, path: str, key: str) -> dict[str, Any]:  # noqa: ANN401 - any JSON
    parts = ("images", "annotations", "categories")
    for part in parts:
        good = isinstance(read, dict) and isinstance(read.get(part), list)
        require(good and all(isinstance(entry, dict) for entry in read[part]), f"{_wrong(path, key)} no list {part!r}")
    require(bool(read["images"]), f"{_wrong(path, key)} no images")
    require(bool(read["categories"]), f"{_wrong(path, key)} no categories")
    return read


def _wrong(path: str, key: str) -> str:
    """Return the beginning of a message about annotations."""
    return f"{key}: {printable(path)} holds no COCO annotations of instances, as it has"


class Parsed(NamedTuple):
    """What a file of annotations holds."""

    tables: Tables
    categories: dict[int, str]  # names by ascending id
    left_out: LeftOut


def _parse(read: dict[str, Any], path: str, key: str) -> Parsed:
    """Turn COCO annotations into arrays; see `open_annotated` for errors."""
    file = f"{key}: {printable(path)}"
    categories = _categories(read["categories"], file)
    labels = {category: label for label, category in enumerate(categories)}
    ids, names, sizes = _images(read["images"], file)
    rows = {image_id: row for row, image_id in enumerate(ids)}
    left_out: LeftOut = {}

    def leave_out(reason: str, name: object) -> None:
        count, first = left_out.get(reason, (0, f"annotation {name}"))
        left_out[reason] = (count + 1, first)

    image_rows: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    object_labels, kinds, mask_sizes, masks = [], bytearray(), [0], bytearray()
    for position, entry in enumerate(read["annotations"]):
        name = entry.get("id", f"at position {position}")
        try:
            row = rows.get(entry["image_id"])
            label = labels.get(entry["category_id"])
            x, y, width, height = map(float, entry["bbox"])
            area = float(entry.get("area", width * height))
        except KeyError as error:
            raise UserError(f"{file}: annotation {name} has no {error}; add it or choose other annotations") from None
        except (TypeError, ValueError):
            raise UserError(
                f"{file}: annotation {name} has the bbox {shorten(entry['bbox'])} and the area "
                f"{shorten(entry.get('area'))}; write bbox as x, y, width, height, and area as a number"
            ) from None
        if row is None or label is None:
            leave_out(UNKNOWN_IMAGE if row is None else UNKNOWN_CATEGORY, name)
            continue
        if reason := _unusable(entry, (x, y, width, height, area), sizes[row]):
            leave_out(reason, name)
            continue
        segmentation = entry.get("segmentation")
        try:
            kind, data, bad = _pack(segmentation, sizes[row])
        except ValueError as error:
            raise UserError(f"{file}: annotation {name} {error}") from None
        for _ in range(bad):
            leave_out(POLYGON, name)
        if bad and not data:  # an object that has lost its whole mask
            continue
        image_rows.append(row)
        boxes.append((x, y, x + width, y + height))
        object_labels.append(label)
        kinds.append(kind)
        masks += data
        mask_sizes.append(len(data))
    if _POLYGONS in kinds:
        mask_api()  # fails now, not for every image
    # Sort the objects by image; masks move with them.
    order = np.argsort(image_rows, kind="stable") if image_rows else np.zeros(0, np.int64)
    lengths = np.array(mask_sizes[1:], np.int64)
    starts = np.cumsum(lengths) - lengths
    first = np.concatenate([[0], np.cumsum(np.bincount(np.array(image_rows, np.int64), minlength=len(ids)))])
    view = memoryview(masks)
    data = b"".join(view[starts[number] : starts[number] + lengths[number]] for number in order)
    tables = Tables(
        image_ids=np.array(ids, np.int64),
        names=np.array([os.fsencode(name) for name in names]),
        sizes=np.array(sizes, np.int32),
        first=first.astype(np.int64),
        boxes=np.array(boxes, np.float32).reshape(-1, 4)[order],
        labels=np.array(object_labels, np.int32)[order],
        mask_kinds=np.frombuffer(bytes(kinds), np.uint8)[order],
        mask_first=np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64),
        mask_data=np.frombuffer(data, np.uint8),
    )
    return Parsed(tables, categories, left_out)


def _categories(entries: list[dict[str, Any]], file: str) -> dict[int, str]:
    """Return the names of the categories by ascending id."""
    found: dict[int, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not isinstance(number, int) or not isinstance(name, str):
            raise UserError(f"{file}: the category {shorten(entry)} needs a name, and an id that is a whole number")
        require(number not in found, f"{file}: two categories have the id {number}; give each its own")
        found[number] = name
    return dict(sorted(found.items()))


def _images(entries: list[dict[str, Any]], file: str) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Return ids, file names, and sizes (height and width) of the images."""
    ids: dict[int, None] = {}
    names, sizes = [], []
    for entry in entries:
        number, name, height, width = (entry.get(key) for key in ("id", "file_name", "height", "width"))
        if not isinstance(number, int):
            raise UserError(f"{file}: the image {shorten(entry)} needs an id that is a whole number")
        require(number not in ids, f"{file}: two images have the id {number}; give each its own")
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: image {number} has no file_name; add it or remove the image")
        if not isinstance(height, int | float) or not isinstance(width, int | float) or not min(height, width) >= 1:
            raise UserError(f"{file}: image {number} needs height and width in pixels, not {height!r} and {width!r}")
        ids[number] = None
        names.append(name)
        sizes.append((int(height), int(width)))
    return [*ids], names, sizes


def _unusable(entry: dict[str, Any], values: tuple[float, ...], size: tuple[int, int]) -> str:
    """Return the reason why an object does not count, "" if it does (DET 1.1)."""
    x, y, width, height, area = values
    if not all(map(math.isfinite, values)):
        return NOT_FINITE
    if entry.get("ignore"):
        return IGNORED
    if entry.get("iscrowd"):
        return CROWD
    if area <= 0 or width < 1 or height < 1:
        return NO_AREA
    overlaps = min(x + width, size[1]) > max(x, 0) and min(y + height, size[0]) > max(y, 0)
    return "" if overlaps else OUTSIDE


def _pack(segmentation: Any, size: tuple[int, int]) -> tuple[int, bytes, int]:  # noqa: ANN401 - any JSON
    """Return the kind and the bytes of a mask, and the number of polygons left out.

    Raises:
        ValueError: with a phrase about the annotation.
    """
    if not segmentation:
        return _NO_MASK, b"", 0
    if isinstance(segmentation, dict):
        return _RUN_LENGTHS, _run_lengths(segmentation, size), 0
    try:
        parts = [np.asarray(part, np.float32) for part in segmentation]
    except (TypeError, ValueError):
        parts = [np.zeros((), np.float32)]
    if any(part.ndim != 1 for part in parts):
        raise ValueError(
            f"has the segmentation {shorten(segmentation)}; write a list of polygons, each a list of numbers, or RLE"
        )
    good = [part for part in parts if len(part) >= MIN_POLYGON and len(part) % 2 == 0 and np.isfinite(part).all()]
    if not good:
        return _NO_MASK, b"", len(parts)
    header = np.array([len(good), *map(len, good)], np.int32)
    return _POLYGONS, header.tobytes() + np.concatenate(good).tobytes(), len(parts) - len(good)


def _run_lengths(segmentation: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Return compressed run lengths; errors as for `_pack`."""
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(counts, str | bytes | list) or not isinstance(given, list):
        raise ValueError("has RLE without counts or size; write both")
    if tuple(given) != size:
        raise ValueError(f"has RLE of size {shorten(given)}, but its image has {[*size]}; write height and width of it")
    if isinstance(counts, list):
        total = sum(counts)
        if total != size[0] * size[1]:
            raise ValueError(f"has RLE of {total} pixels, but its image has {size[0] * size[1]}")
        counts = mask_api().frPyObjects({"size": given, "counts": counts}, *size)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


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
    found = _parse(_check(annotations, name, key), name, key)
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
