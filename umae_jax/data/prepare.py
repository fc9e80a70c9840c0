"""Write a folder of images as a TFDS data set in ArrayRecord files, for clusters and slow disks.

    python -m umae_jax.data.prepare --source folder:PATH --name NAME --data_dir DIR

Train on it with `data.source = tfds:NAME` and `data.data_dir = DIR`. Image files are copied byte for byte; those that
cannot be read are named, counted and left out.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from umae_jax import cli, console
from umae_jax.data.sources import FILE_NAME, NO_LABEL, Source, open_source
from umae_jax.errors import printable, require
from umae_jax.files import locate_local

VERSION = "1.0.0"

_SOURCE = flags.DEFINE_string("source", None, "Images to write: folder:PATH, or photos.")
_NAME = flags.DEFINE_string("name", None, "Name of the data set: lower-case letters, digits, underscores.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of TFDS data sets.")
_SPLIT = flags.DEFINE_string("split", "train", "Split to write.")


class Written(NamedTuple):
    """A data set's folder, the number of images written to it, and the number of unreadable images left out."""

    folder: Path
    images: int
    unreadable: int


def write_data_set(source: Source, name: str, data_dir: str, split: str = "train") -> Written:
    """Write a source as version VERSION of the TFDS data set `name`.

    A UserError names a flag to change: the name or split is invalid, the data set exists, or no image can be read.
    """
    import tensorflow_datasets as tfds  # slow to import

    message = f"--name: {name!r} is invalid; begin with a letter and use lower-case letters, digits and underscores"
    require(re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None, message)
    message = f"--split: {split!r} is invalid; use letters, digits and underscores, such as train or validation"
    require(re.fullmatch(r"[A-Za-z0-9_]+", split) is not None and split != "all", message)
    root = locate_local(data_dir, "--data_dir")
    folder = root / name / VERSION
    require(not folder.exists(), f"--name: {folder} exists already; choose another name or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)  # fails before TFDS prints anything
    features = {"image": tfds.features.Image(), FILE_NAME: tfds.features.Text()}
    if source.classes:
        features["label"] = tfds.features.ClassLabel(names=list(source.classes))
    unreadable = 0

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal unreadable
        for index in range(len(source)):
            try:
                path, data, label = source[index]
            except OSError as error:
                unreadable += 1
                name = printable(os.fsdecode(error.filename)) if error.filename else f"record {index}"
                console.say(f"left out an image that cannot be read: {name} ({error.strerror or error})")
                continue
            example = {"image": io.BytesIO(data), FILE_NAME: Path(path).name}
            yield index, example if label == NO_LABEL else {**example, "label": label}
        message = f"--source: none of its {unreadable} images can be read; repair them or choose another"
        require(unreadable < len(source), message)

    class FolderBuilder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
        def _split_generators(self, _: Any) -> dict[str, Any]:  # noqa: ANN401 - TFDS's own needs TensorFlow
            return {split: examples()}

    builder = FolderBuilder(
        name=name,
        version=VERSION,
        features=tfds.features.FeaturesDict(features),
        split_datasets={},
        data_dir=str(root),
        file_format="array_record",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads
        builder.download_and_prepare()
    return Written(folder, len(source) - unreadable, unreadable)


def main() -> None:
    """Write the data set that the flags describe."""
    source = open_source(cli.required(_SOURCE, "folder:PATH"))
    if source.summary:
        console.say(source.summary)
    name = cli.required(_NAME, "a name for the data set")
    data_dir = cli.required(_DATA_DIR, "the directory of TFDS data sets")
    folder, images, unreadable = write_data_set(source, name, data_dir, _SPLIT.value)
    left_out = f", left out {unreadable} that cannot be read" if unreadable else ""
    console.result(
        f"wrote {images} images to {folder}{left_out}; train with --config.data.source=tfds:{name} "
        f"--config.data.data_dir={data_dir} --config.data.split={_SPLIT.value}"
    )


if __name__ == "__main__":
    cli.run(main)
