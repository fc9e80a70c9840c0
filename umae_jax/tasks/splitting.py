"""Split labelled images into those that train and those that validate, and count their classes."""

import hashlib
from collections.abc import Sequence

import numpy as np

from umae_jax.data.sources import ImageFiles, Record, Source
from umae_jax.errors import printable

MAX_NAMED_CLASSES = 8  # in a summary


class Subset:
    """Some records of a source.

    Args:
        source: the source.
        indices: of the records, ascending, int64 [N].
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes
        self.summary, self.digest, self.max_pixels = source.summary, source.digest, source.max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]


def known_labels(source: Source) -> np.ndarray | None:
    """Return the label of every record, int64 [N]; None if they are not known without reading all records."""
    if isinstance(source, Subset):
        labels = known_labels(source.source)
        return None if labels is None else labels[source.indices]
    return source.labels if isinstance(source, ImageFiles) and source.classes else None


def split(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Split a source into training and validation images.

    Each class gives its fraction, rounded, but at least one image, and keeps at least one; a single image trains. The
    images of a class with the lowest hashes of seed and name validate: the same ones on every machine and, apart from
    a few, after images are added. A TFDS data set is split as one class, as its labels are not known without reading
    all records, by the numbers of its records.
    """
    labels = known_labels(source)
    labels = np.zeros(len(source), np.int64) if labels is None else labels
    names = _names(source)
    salt = seed.to_bytes(8, "little")
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(name, digest_size=8, salt=salt).digest()) for name in names], np.uint64
    )
    order = np.lexsort((hashes, labels))  # class after class, each by hash
    counts = np.bincount(labels)
    rank = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.clip(np.floor(fraction * counts + 0.5).astype(np.int64), 1, np.maximum(counts - 1, 0))
    wanted[counts < 2] = 0
    validates = np.zeros(len(source), bool)
    validates[order] = rank < wanted[labels[order]]
    return Subset(source, np.flatnonzero(~validates)), Subset(source, np.flatnonzero(validates))


def _names(source: Source) -> Sequence[bytes]:
    """Return a name per record that does not depend on where the folder lies."""
    if not isinstance(source, ImageFiles):
        return [str(index).encode() for index in range(len(source))]
    return source.names.tolist()


def summarize_classes(source: Source) -> str:
    """Return the number of classes, their images and their imbalance: "3: cat 20, cup 20, rock 5 (imbalance 4.0)".

    Imbalance is the number of images of the largest class / that of the smallest.
    """
    labels, names = known_labels(source), source.classes
    if labels is None:
        return str(len(names))
    counts = np.bincount(labels, minlength=len(names))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if len(names) <= MAX_NAMED_CLASSES:
        listed = ", ".join(f"{printable(name)} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        listed = (
            f"from {printable(names[smallest])} {counts[smallest]:,} to {printable(names[largest])} {counts[largest]:,}"
        )
    imbalance = (
        f"{counts[largest] / counts[smallest]:.1f}"
        if counts[smallest]
        else f"{printable(names[smallest])} has no image"
    )
    return f"{len(names):,}: {listed} (imbalance {imbalance})"
