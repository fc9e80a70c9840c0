"""Write a folder of images as a TFDS data set in ArrayRecord files, for clusters and slow disks.

    python -m umae_jax.data.prepare --source folder:PATH --name NAME --data_dir DIR

Train on it with `data.source = tfds:NAME` and `data.data_dir = DIR`. The files' bytes are copied as they are.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from umae_jax import cli
from umae_jax.data.sources import FILE_NAME, NO_LABEL, Source, open_source
from umae_jax.errors import require
from umae_jax.files import locate_here

VERSION = "1.0.0"

_SOURCE = flags.DEFINE_string("source", None, "What to write: folder:PATH, or photos.")
_NAME = flags.DEFINE_string("name", None, "How the data set is to be called: lower-case letters, digits, underscores.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS data sets lie.")
_SPLIT = flags.DEFINE_string("split", "train", "The split to write.")


def write_data_set(source: Source, name: str, data_dir: str, split: str = "train") -> Path:
    """Write a source as the TFDS data set `name`, version VERSION; returns its folder.

    Raises:
        UserError: if the name or split will not do, or the name is taken.
    """
    import tensorflow_datasets as tfds  # slow to import

    require(
        re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
        f"--name: {name!r} will not do; begin with a letter and use lower-case letters, digits and underscores",
    )
    require(
        re.fullmatch(r"[A-Za-z0-9_]+", split) is not None and split != "all",
        f"--split: {split!r} will not do; use letters, digits and underscores, such as train or validation",
    )
    root = locate_here(data_dir, "--data_dir")
    folder = root / name / VERSION
    require(not folder.exists(), f"--name: {folder} exists already; choose another name or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)  # fails before TFDS says a word
    features: dict[str, Any] = {"image": tfds.features.Image(), FILE_NAME: tfds.features.Text()}
    if source.classes:
        features["label"] = tfds.features.ClassLabel(names=list(source.classes))

    data_set_name = name

    class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Copies a source record by record."""

        name = data_set_name
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> dict[str, Any]:  # noqa: ANN401 - a download manager
            return {split: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for number in range(len(source)):
                path, data, label = source[number]
                example: dict[str, Any] = {"image": io.BytesIO(data), FILE_NAME: Path(path).name}
                yield number, example if label == NO_LABEL else {**example, "label": label}

    builder = FolderBuilder(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return folder


def main() -> None:
    """Write it."""
    source = open_source(cli.required(_SOURCE, "folder:PATH"))
    name = cli.required(_NAME, "a name for the data set")
    data_dir = cli.required(_DATA_DIR, "the folder where TFDS data sets lie")
    folder = write_data_set(source, name, data_dir, _SPLIT.value)
    print(f"wrote {len(source)} images to {folder}; train with --config.data.source=tfds:{name} ", end="")  # noqa: T201
    print(f"--config.data.data_dir={data_dir} --config.data.split={_SPLIT.value}")  # noqa: T201


if __name__ == "__main__":
    cli.run(main)
