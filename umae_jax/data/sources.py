"""Image sources: bundled photographs, a folder, a TFDS data set. Each maps an index to an undecoded record."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np

from umae_jax.errors import UserError, listing, require
from umae_jax.files import AnyPath, files_in_bucket, in_bucket, locate, read_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
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

    name: str  # for messages
    data: bytes  # contents of the image file
    label: int  # index of its class, or NO_LABEL


class Source(Protocol):
    """A sequence of records. Must be picklable; reading a record may raise any exception."""

    classes: tuple[str, ...]  # names of the classes, in the order of their labels; () without labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class ImageFiles:
    """Image files, read where they lie, each with a label if there are classes."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] = (), classes: Sequence[str] = ()) -> None:
        # Arrays, not lists of objects: small, and fast to pickle for workers.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, np.int64)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index: int) -> Record:
        path = self.name(index)
        return Record(path, read_file(path), int(self.labels[index]) if self.classes else NO_LABEL)


@dataclass
class TfdsImages:
    """The images of a prepared TFDS data set, not decoded."""

    data: Any  # from `as_data_source`, with decoding skipped
    image: str  # name of the image feature
    label: str | None  # name of the label feature, if any
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        name = record.get(FILE_NAME, b"")
        name = name.decode() if isinstance(name, bytes) else str(name)
        label = NO_LABEL if self.label is None else int(record[self.label])
        return Record(f"record {index} {name}".strip(), record[self.image], label)


def open_source(name: str, *, split: str = "train", data_dir: str | None = None, key: str = "data") -> Source:
    """Open `photos`, `folder:PATH` or `tfds:NAME`.

    Args:
        name: value of `data.source` or `validation.source`; a UserError if it does not exist or has no images.
        split: of a TFDS data set.
        data_dir: directory of TFDS data sets; None for TFDS's default.
        key: section of the configuration, for error messages.
    """
    kind, _, rest = name.partition(":")
    if name == "photos":
        return _open_photographs()
    if kind == "folder" and rest:
        return open_folder(rest, f"{key}.source")
    if kind == "tfds" and rest:
        return _open_tfds(rest, split, data_dir, key)
    raise UserError(f"{key}.source: unknown source {name!r}; write photos, folder:PATH or tfds:NAME")


def _open_photographs() -> ImageFiles:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError('data.source: photos come with scikit-image; install it with pip install "umae_jax[demo]"')
    folder = Path(package.origin).parent / "data"
    paths = [str(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()]
    require(bool(paths), f"data.source: {folder} has none of the expected photographs; reinstall scikit-image")
    return ImageFiles(paths)


def open_images(path: Path) -> ImageFiles:
    """Open the value of a command's `--images`, an image file or a folder; errors as for `open_folder`."""
    if path.is_file():
        return ImageFiles([str(path)])
    require(path.is_dir(), f"--images: there is no file or folder {path}")
    return open_folder(str(path), "--images")


def open_folder(path: str, key: str = "data.source") -> ImageFiles:
    """Open a tree of image files. Its direct subfolders are the classes, unless an image lies beside them.

    Args:
        path: of the folder, local or in a bucket; a UserError if it does not exist or has no images.
        key: configuration key or flag that names the folder, for error messages.
    """
    root = locate(path, key)
    require(root.is_dir(), f"there is no folder {path}; write the path of a folder with images")
    paths = sorted(file for file in _list_files(root) if file.lower().endswith(SUFFIXES))
    require(bool(paths), f"there is no image in {path} or below it; expected files ending in {listing(SUFFIXES)}")
    parts = [PurePath(file).relative_to(PurePath(str(root))).parts for file in paths]
    if any(len(part) == 1 for part in parts):
        return ImageFiles(paths)
    classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
    return ImageFiles(paths, labels.tolist(), classes.tolist())


def _list_files(root: AnyPath) -> Iterator[str]:
    """List all files of a tree, and follow symbolic links; an OSError if a folder cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    if in_bucket(root):
        yield from files_in_bucket(root)
        return
    visited = set()  # links may form cycles
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()
        yield from (os.path.join(folder, file) for file in files)


def _open_tfds(name: str, split: str, data_dir: str | None, key: str) -> TfdsImages:
    """Open a TFDS data set that is stored as ArrayRecord, given its name or the folder of one version."""
    import tensorflow_datasets as tfds  # slow to import

    if data_dir is not None:
        data_dir = str(locate(data_dir, "data.data_dir"))
    directory = data_dir or "TFDS's default directory"
    unprepared = UserError(
        f"{key}.source: there is no prepared data set {name} in {directory}; set data.data_dir to its directory, "
        f"or prepare it with tfds build {name} --file_format=array_record"
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
    return TfdsImages(data, images[0], label, tuple(features[label].names) if label else ())
