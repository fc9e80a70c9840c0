"""Read COCO's JSON annotations into compact arrays, and check them (DET 1.1). Does not import JAX."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from umae_jax.data.instances import Mask, Polygons, RunLengths, mask_api, parse_counts
from umae_jax.errors import UserError, printable, require, shorten
from umae_jax.files import read_file

MIN_POLYGON = 6  # numbers, which are three points
MAX_SIDE = 10**6  # pixels
MAX_ID = 2**63
MAX_COORDINATE = 1e5  # pixels; drawing a polygon takes memory in proportion to its length

# Reasons for leaving an object out.
CROWD = "crowd regions"
IGNORED = "objects marked as ignored"
NO_AREA = "boxes without area or with sides below 1 pixel"
NOT_FINITE = "boxes that are not finite"
OUTSIDE = "boxes outside of their image"
POLYGON = "polygons with too few, odd or impossible numbers"
UNKNOWN_CATEGORY = "objects of unknown categories"
UNKNOWN_IMAGE = "objects of unknown images"

_NO_MASK, _POLYGONS, _RUN_LENGTHS = range(3)

LeftOut = dict[str, tuple[int, str]]  # number and first example, by reason


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

    @property
    def has_masks(self) -> bool:
        """Return whether any object has a mask."""
        return bool(self.mask_kinds.any())

    def masks(self, objects: slice) -> Iterator[Mask | None]:
        """Yield the masks of objects."""
        for number in range(objects.start, objects.stop):
            data = self.mask_data[self.mask_first[number] : self.mask_first[number + 1]]
            if self.mask_kinds[number] == _NO_MASK:
                yield None
            elif self.mask_kinds[number] == _RUN_LENGTHS:
                yield RunLengths(data.tobytes())
            else:
                words = data.view(np.int32)
                points = data.view(np.float32)[1 + words[0] :]
                yield Polygons(tuple(np.split(points, np.cumsum(words[1 : words[0]]))))


class Parsed(NamedTuple):
    """Contents of a file of annotations."""

    tables: Tables
    categories: dict[int, str]  # names by ascending id
    left_out: LeftOut


def read_coco(path: str, key: str) -> dict[str, Any]:
    """Read a file of COCO annotations and check its outermost structure.

    Args:
        path: of the file, local or in a bucket.
        key: configuration key or flag that names it, for error messages.

    Raises:
        UserError: if it is not JSON, or not COCO's.
    """
    try:
        read = json.loads(read_file(path))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{key}: {printable(path)} is not JSON ({error}); choose COCO annotations") from None
    return check(read, path, key)


def check(read: Any, path: str, key: str) -> dict[str, Any]:  # noqa: ANN401 - any JSON
    """Return annotations that have the outermost structure of COCO's; see `read_coco`."""
    wrong = f"{key}: {printable(path)} holds no COCO annotations of instances, as it has"
    for part in ("images", "annotations", "categories"):
        good = isinstance(read, dict) and isinstance(read.get(part), list)
        require(good and all(isinstance(entry, dict) for entry in read[part]), f"{wrong} no list {part!r} of objects")
    require(bool(read["images"]), f"{wrong} no images")
    require(bool(read["categories"]), f"{wrong} no categories")
    return read


def parse(read: dict[str, Any], path: str, key: str) -> Parsed:
    """Turn annotations into arrays. Objects that do not count are counted by reason.

    Args:
        read: COCO's structure.
        path, key: for error messages.

    Raises:
        UserError: naming the file, and the image, category or annotation that is wrong.
    """
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
        name = shorten(entry.get("id", f"at position {position}"))
        values = _numbers(entry, f"{file}: annotation {name}")
        row, label = rows.get(entry["image_id"]), labels.get(entry["category_id"])
        if row is None or label is None:
            leave_out(UNKNOWN_IMAGE if row is None else UNKNOWN_CATEGORY, name)
            continue
        try:
            kind, data, bad = _pack(entry.get("segmentation"), sizes[row])
        except ValueError as error:
            raise UserError(f"{file}: annotation {name} {error}") from None
        if reason := _unusable(entry, values, sizes[row]):
            leave_out(reason, name)
            continue
        for _ in range(bad):
            leave_out(POLYGON, name)
        if bad and not data:  # an object that has lost its whole mask
            continue
        image_rows.append(row)
        x, y, width, height, _ = values
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
        names=np.array(names),
        sizes=np.array(sizes, np.int32),
        first=first.astype(np.int64),
        boxes=np.array(boxes, np.float32).reshape(-1, 4)[order],
        labels=np.array(object_labels, np.int32)[order],
        mask_kinds=np.frombuffer(bytes(kinds), np.uint8)[order],
        mask_first=np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64),
        mask_data=np.frombuffer(data, np.uint8),
    )
    return Parsed(tables, categories, left_out)


def _is_id(value: Any) -> TypeGuard[int]:  # noqa: ANN401 - any JSON
    return isinstance(value, int) and -MAX_ID <= value < MAX_ID


def _categories(entries: list[dict[str, Any]], file: str) -> dict[int, str]:
    """Return the names of the categories by ascending id."""
    found: dict[int, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not _is_id(number) or not isinstance(name, str):
            raise UserError(f"{file}: the category {shorten(entry)} needs a name, and an id that is a whole number")
        require(number not in found, f"{file}: two categories have the id {number}; give each its own")
        require(name not in found.values(), f"{file}: two categories have the name {shorten(name)}; give each its own")
        found[number] = name
    return dict(sorted(found.items()))


def _images(entries: list[dict[str, Any]], file: str) -> tuple[list[int], list[bytes], list[tuple[int, int]]]:
    """Return ids, file names, and sizes (height and width) of the images."""
    ids: dict[int, None] = {}
    names, sizes = [], []
    for entry in entries:
        number, name, *sides = (entry.get(key) for key in ("id", "file_name", "height", "width"))
        if not _is_id(number):
            raise UserError(f"{file}: the image {shorten(entry)} needs an id that is a whole number")
        require(number not in ids, f"{file}: two images have the id {number}; give each its own")
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"{file}: image {number} has no file_name; add it or remove the image")
        height, width = (side if isinstance(side, int | float) else 0 for side in sides)
        if not (1 <= height < MAX_SIDE and 1 <= width < MAX_SIDE):
            raise UserError(f"{file}: image {number} needs height and width in pixels, not {shorten(sides)}")
        try:
            names.append(os.fsencode(name))
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError(f"{file}: image {number} has the file_name {name!r}, which is no text") from None
        ids[number] = None
        sizes.append((int(height), int(width)))
    return [*ids], names, sizes


def _numbers(entry: dict[str, Any], place: str) -> tuple[float, float, float, float, float]:
    """Check the ids of an annotation; return its box (x, y, width, height) and area."""
    try:
        good = _is_id(entry["image_id"]) and _is_id(entry["category_id"])
        require(good, f"{place} needs an image_id and a category_id that are whole numbers")
        x, y, width, height = map(float, entry["bbox"])
        return x, y, width, height, float(entry.get("area", width * height))
    except KeyError as error:
        raise UserError(f"{place} has no {error}; add it or choose other annotations") from None
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{place} has the bbox {shorten(entry['bbox'])} and the area {shorten(entry.get('area'))}; "
            "write bbox as x, y, width, height, and area as a number"
        ) from None


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
    parts = usable_polygons(segmentation)
    if not parts:
        return _NO_MASK, b"", len(segmentation)
    header = np.array([len(parts), *map(len, parts)], np.int32)
    return _POLYGONS, header.tobytes() + np.concatenate(parts).tobytes(), len(segmentation) - len(parts)


def usable_polygons(segmentation: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Return the polygons that can be drawn, each float32 [2 * points]; errors as for `_pack`."""
    try:
        parts = [np.asarray(part, np.float32) for part in segmentation]
    except (TypeError, ValueError, OverflowError):
        parts = [np.zeros((), np.float32)]
    if any(part.ndim != 1 for part in parts):
        text = shorten(segmentation)
        raise ValueError(f"has the segmentation {text}; write a list of polygons, each a list of numbers, or RLE")
    return [
        part
        for part in parts
        if len(part) >= MIN_POLYGON and len(part) % 2 == 0 and np.abs(part).max() < MAX_COORDINATE  # not if NaN
    ]


def _run_lengths(segmentation: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Return the compressed run lengths of an image of the given size; errors as for `_pack`."""
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(counts, str | list) or not isinstance(given, list):
        raise ValueError("has RLE without counts or size; write both")
    if tuple(given) != size:
        raise ValueError(f"has RLE of size {shorten(given)}, but its image has {[*size]}; write its height and width")
    if isinstance(counts, str):
        text = counts.encode()
        runs = parse_counts(text)
    else:
        good = all(isinstance(count, int) and 0 <= count < MAX_ID for count in counts)
        runs = np.array(counts if good else [-1], np.int64)
    if not len(runs) or runs.min() < 0 or runs.sum() != size[0] * size[1]:
        raise ValueError(f"has RLE of other than {size[0] * size[1]} pixels, those of its image; write its run lengths")
    if isinstance(counts, list):
        text = mask_api().frPyObjects({"size": given, "counts": counts}, *size)["counts"]
        return text.encode() if isinstance(text, str) else text
    return text
