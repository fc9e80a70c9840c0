"""Where images come from: bundled photographs, a folder, a TFDS data set; all give a record for an index."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np

from umae_jax.errors import UserError, listing
from umae_jax.files import AnyPath, files_in_bucket, in_bucket, locate, read_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_LABEL = -1
FILE_NAME = "file_name"  # the feature in which TFDS data sets often say where an image came from

# The photographs among the images that scikit-image installs with its wheel.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


class Record(NamedTuple):
    """One image as it lies on disk.

    Attributes:
        name: how to call it in a message.
        data: the encoded bytes.
        label: its class, or NO_LABEL.
    """

    name: str
    data: bytes
    label: int


class Source(Protocol):
    """A data set of encoded images. Reading may raise; workers receive it by pickling."""

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Record:
        """The record at a place."""
        ...


class Files:
    """Image files, read in place.

    Args:
        paths: the files, in the order that makes their index.
        labels: one class a file, or nothing.
        classes: names of the classes.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None = None, classes: Sequence[str] = ()) -> None:
        # One array of bytes instead of a list of strings: small, and quick to hand to workers.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        path = os.fsdecode(self.paths[index])
        label = NO_LABEL if self.labels is None else int(self.labels[index])
        return Record(path, read_file(path), label)


class TfdsImages:
    """A prepared TFDS data set with an image feature, read undecoded.

    Args:
        data: what TFDS's `as_data_source` returned.
        image: name of the image feature.
        label: name of the class feature, if there is one.
        classes: names of the classes.
    """

    def __init__(self, data: Any, image: str, label: str | None, classes: Sequence[str]) -> None:  # noqa: ANN401
        self.data, self.image, self.label = data, image, label
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        record = self.data[index]
        label = NO_LABEL if self.label is None else int(record[self.label])
        name = record.get(FILE_NAME, b"")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return Record(f"record {index} {name}".strip(), record[self.image], label)


def open_source(name: str, *, split: str = "train", data_dir: str | None = None, key: str = "data") -> Source:
    """Open `photos`, `folder:PATH` or `tfds:NAME`.

    Args:
        name: the configuration's `data.source`, or that of `validation`.
        split: the split of a TFDS data set.
        data_dir: where TFDS data sets lie; TFDS's own default if None.
        key: the part of the configuration that names it, for error messages.

    Raises:
        UserError: if there is no such source, or nothing in it.
    """
    kind, _, rest = name.partition(":")
    if name == "photos":
        return _photographs()
    if kind == "folder" and rest:
        return open_folder(rest, f"{key}.source")
    if kind == "tfds" and rest:
        return _open_tfds(rest, split, data_dir, key)
    raise UserError(f"{key}.source: unknown source {name!r}; write photos, folder:PATH or tfds:NAME")


def _photographs() -> Files:
    """The photographs that scikit-image ships."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError('data.source: photos come with scikit-image; install it with pip install "umae_jax[demo]"')
    folder = Path(package.origin).parent / "data"
    paths = [str(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()]
    if not paths:
        raise UserError(f"data.source: {folder} holds none of the expected photographs; install scikit-image anew")
    return Files(paths)


def open_folder(path: str, key: str = "data.source") -> Files:
    """A tree of image files; the subfolders directly below it, if every file lies in one, are the classes.

    Raises:
        UserError: if the folder is missing or holds no images.
        OSError: if a part of it cannot be listed.
    """
    root = locate(path, key)
    if not root.is_dir():
        raise UserError(f"there is no folder {path}; write the path of one that holds images")
    paths = [file for file in _files_below(root) if file.lower().endswith(SUFFIXES)]
    if not paths:
        raise UserError(f"there is no image in {path} or below it; expected files ending in {listing(SUFFIXES)}")
    paths.sort()
    parts = [PurePath(file).relative_to(PurePath(str(root))).parts for file in paths]
    if any(len(part) == 1 for part in parts):
        return Files(paths)
    classes = sorted({part[0] for part in parts})
    number = {name: index for index, name in enumerate(classes)}
    return Files(paths, [number[part[0]] for part in parts], classes)


def _files_below(root: AnyPath) -> Iterator[str]:
    """The files of a tree."""

    def tell(error: OSError) -> None:
        raise error

    if in_bucket(root):
        yield from files_in_bucket(root)
        return
    visited = set()  # links may lead back
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=tell):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()
        yield from (os.path.join(folder, file) for file in files)


def open_images(path: Path) -> Files:
    """What a command's --images names: one image file, or a folder of them.

    Raises:
        UserError: if there is neither.
    """
    if path.is_file():
        return Files([str(path)])
    if not path.is_dir():
        raise UserError(f"--images: there is no file or folder {path}")
    return open_folder(str(path))


def _open_tfds(name: str, split: str, data_dir: str | None, key: str) -> TfdsImages:
    """A TFDS data set that has been prepared as ArrayRecord, by name or by the folder of one version."""
    import tensorflow_datasets as tfds  # slow to import, and needed by this source alone

    if data_dir is not None:
        data_dir = str(locate(data_dir, "data.data_dir"))
    where = data_dir or "TFDS's default folder"
    unprepared = UserError(
        f"{key}.source: there is no prepared data set {name} in {where}; set data.data_dir to where it lies, "
        f"or prepare it with tfds build {name} --file_format=array_record"
    )
    folder = locate(name, f"{key}.source").is_dir()
    try:
        builder = tfds.builder_from_directory(name) if folder else tfds.builder(name, data_dir=data_dir)
    except Exception:  # unknown, misspelt, not a data set's folder, or code that needs what only preparing needs
        raise unprepared from None
    if not builder.is_prepared():
        raise unprepared
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images:
        raise UserError(f"{key}.source: {name} has no image feature, only {listing(list(features))}")
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if split not in builder.info.splits:
        raise UserError(f"{key}.split: {name} has no split {split}; choose {listing(list(builder.info.splits))}")
    try:
        data = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise UserError(
            f"{key}.source: {name} in {where} is not stored as ArrayRecord, which random access needs; "
            f"run tfds build {name} --file_format=array_record --overwrite"
        ) from None
    label = labels[0] if labels else None
    return TfdsImages(data, images[0], label, features[label].names if label else ())
