"""Image sources: bundled photographs, a folder, a TFDS data set. Each maps an index to an undecoded record."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from umae_jax.data.folders import Found, find_images
from umae_jax.data.formats import suffixes
from umae_jax.errors import MissingDataError, UserError, listing, printable, require
from umae_jax.files import locate, read_file

NO_LABEL = -1
FILE_NAME = "file_name"  # the feature of many TFDS data sets that holds an image's original file name

# The photographs among the images in scikit-image's wheel.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
    "rocket.jpg",
)


class Record(NamedTuple):
    """One image as stored."""

    name: str  # for messages and tables, printable
    data: bytes  # contents of the image file
    label: int  # index of its class, or NO_LABEL


class Source(Protocol):
    """A sequence of records. Must be picklable; reading a record may raise any exception."""

    classes: tuple[str, ...]  # printable names of the classes, in the order of their labels; () without labels
    summary: str  # of the images, their classes, and what was left out; "" if there is nothing to say
    max_pixels: int | None  # that an image may have; see `EncodedImage`

    @property
    def digest(self) -> str:
        """Digest of the images' names, which a run that continues compares; "" if they have none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class ImageFiles:
    """Image files of a folder, read where they lie, each with a label if there are classes.

    Args:
        folder: path of the folder.
        names: paths of the files relative to it, sorted.
        labels: of each file, if there are classes.
        classes, summary: see `Source`.
    """

    def __init__(
        self,
        folder: str,
        names: Sequence[str],
        labels: Sequence[int] = (),
        classes: Sequence[str] = (),
        summary: str = "",
    ) -> None:
        # Arrays, not lists of objects: small, and fast to pickle for workers.
        self.folder, self.summary = folder, summary
        self.max_pixels: int | None = None
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, np.int64)
        self.classes = tuple(classes)

    @functools.cached_property
    def digest(self) -> str:
        """See `Source`."""
        digest = hashlib.sha256(b"%d" % len(self.names))
        for name in self.names:
            digest.update(b"\0" + name)
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def __getitem__(self, index: int) -> Record:
        path = self.name(index)
        return Record(printable(path), read_file(path), int(self.labels[index]) if self.classes else NO_LABEL)


@dataclass
class TfdsImages:
    """The images of a prepared TFDS data set, not decoded."""

    data: Any  # from `as_data_source`, with decoding skipped
    image: str  # name of the image feature
    label: str | None  # name of the label feature, if any
    classes: tuple[str, ...]
    summary: str = ""
    max_pixels: int | None = None
    digest: str = ""  # reading the names would read the images

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        name = record.get(FILE_NAME, b"")
        name = printable(name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name))
        label = NO_LABEL if self.label is None else int(record[self.label])
        return Record(f"record {index} {name}".strip(), record[self.image], label)


def open_source(
    name: str, *, split: str = "train", data_dir: str | None = None, key: str = "data", max_pixels: int | None = None
) -> Source:
    """Open `photos`, `folder:PATH` or `tfds:NAME`.

    Args:
        name: value of `data.source` or `validation.source`; a UserError if it does not exist or has no images.
        split: of a TFDS data set.
        data_dir: directory of TFDS data sets; None for TFDS's default.
        key: section of the configuration, for error messages.
        max_pixels: that an image may have; see `EncodedImage`.
    """
    kind, _, rest = name.partition(":")
    source: ImageFiles | TfdsImages
    if name == "photos":
        source = _open_photographs()
    elif kind == "folder" and rest:
        source = open_folder(rest, f"{key}.source")
    elif kind == "tfds" and rest:
        source = _open_tfds(rest, split, data_dir, key)
    else:
        raise UserError(f"{key}.source: unknown source {name!r}; write photos, folder:PATH or tfds:NAME")
    source.max_pixels = max_pixels
    return source


def _open_photographs() -> ImageFiles:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        message = 'data.source: photos come with scikit-image; install it with pip install "umae_jax[demo]"'
        raise MissingDataError(message, "data.source")
    folder = Path(package.origin).parent / "data"
    names = [name for name in PHOTOGRAPHS if (folder / name).is_file()]
    require(bool(names), f"data.source: {folder} has none of the expected photographs; reinstall scikit-image")
    return ImageFiles(str(folder), names)


def open_images(path: Path) -> ImageFiles:
    """Open the value of a command's `--images`, an image file or a folder; errors as for `open_folder`."""
    if path.is_file():
        return ImageFiles("", [str(path)])
    require(path.is_dir(), f"--images: there is no file or folder {path}")
    return open_folder(str(path), "--images")


def open_folder(path: str, key: str = "data.source") -> ImageFiles:
    """Open a tree of image files. Its direct subfolders are the classes, unless an image lies beside them.

    Args:
        path: of the folder, local or in a bucket; a UserError if it does not exist or has no images.
        key: configuration key or flag that names the folder, for error messages.
    """
    root = locate(path, key)
    if not root.is_dir():
        message = f"there is no folder {printable(path)}; write the path of a folder with images"
        raise MissingDataError(message, key)
    found = find_images(root)
    left_out = found.describe_left_out()
    require(
        bool(found.images),
        f"there is no image in {printable(path)} or below it; expected files ending in .jpg, .png or one of "
        f"{len(suffixes()) - 2} other suffixes" + (f"; left out: {left_out}" if left_out else ""),
    )
    stray = [name for name in found.images if "/" not in name]
    folders = [] if stray else [name.partition("/")[0] for name in found.images]
    classes = sorted(set(folders))
    indices = {name: index for index, name in enumerate(classes)}
    labels = [indices[name] for name in folders]
    summary = f"{key}: {_summarize(found, stray, classes)} in {printable(path)}"
    summary += f"; left out: {left_out}" if left_out else ""
    return ImageFiles(str(root), found.images, labels, [printable(name) for name in classes], summary)


def _summarize(found: Found, stray: Sequence[str], classes: Sequence[str]) -> str:
    """Return a phrase about the images of a folder and their labels."""
    text = f"{len(found.images):,} image{'s'[: len(found.images) > 1]}"
    if classes:
        empty = listing(sorted(map(printable, found.subfolders.difference(classes))))
        text += f" of {len(classes):,} class{'es'[: 2 * (len(classes) > 1)]}"
        return f"{text} (there are none in the subfolders {empty})" if empty else text
    if found.subfolders:
        beside, rest = printable(min(stray)), len(stray) - 1
        beside += f" and {rest:,} more lie" if rest else " lies"
        text += f" without labels (because {beside} beside the subfolders)"
    return text


def _open_tfds(name: str, split: str, data_dir: str | None, key: str) -> TfdsImages:
    """Open a TFDS data set that is stored as ArrayRecord, given its name or the folder of one version."""
    import tensorflow_datasets as tfds  # slow to import

    if data_dir is not None:
        data_dir = str(locate(data_dir, "data.data_dir"))
    directory = data_dir or "TFDS's default directory"
    unprepared = MissingDataError(
        f"{key}.source: there is no prepared data set {name} in {directory}; set data.data_dir to its directory, "
        f"or prepare it with tfds build {name} --file_format=array_record",
        f"{key}.source",
    )
    is_folder = locate(name, f"{key}.source").is_dir()
    try:
        builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name, data_dir=data_dir)
    except Exception:  # unknown or invalid name, not a data set's folder, or missing packages for preparing
        raise unprepared from None
    if not builder.is_prepared():
        raise unprepared
    features, splits = builder.info.features, builder.info.splits
    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    require(bool(images), f"{key}.source: {name} has no image feature, only {listing(list(features))}")
    require(split in splits, f"{key}.split: {name} has no split {split}; choose {listing(list(splits))}")
    try:
        data = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise UserError(
            f"{key}.source: {name} in {directory} is not stored as ArrayRecord, which random access needs; "
            f"run tfds build {name} --file_format=array_record --overwrite"
        ) from None
    label = labels[0] if labels else None
    return TfdsImages(data, images[0], label, tuple(map(printable, features[label].names)) if label else ())
