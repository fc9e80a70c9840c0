"""A picture of the confusion matrix of a classifier."""

import io
import warnings
from collections.abc import Sequence

import numpy as np

from umae_jax.errors import printable
from umae_jax.tasks.accuracy import Results

CONFUSION_FILE = "confusion.png"  # in a run's directory
MAX_CLASSES = 40  # that are drawn
MAX_NUMBERED = 20  # classes up to which the cells show their numbers
MAX_NAME = 24  # characters of a name
OTHERS = "others"


def confusion_matrix(results: Results, classes: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """Count images by true and predicted class; with more than MAX_CLASSES, for the classes with most errors.

    Returns:
        Counts int64 [rows, columns], the names of the rows, and those of the columns: the same, and OTHERS if classes
        are left out.
    """
    total = len(classes)
    errors = np.bincount(results.labels[results.ranks > 0], minlength=total)
    shown = np.sort(np.argsort(-errors, kind="stable")[:MAX_CLASSES])
    place = np.full(total, len(shown))  # of a class in the matrix; the last column is of all others
    place[shown] = np.arange(len(shown))
    counts = np.zeros((len(shown) + 1, len(shown) + 1), np.int64)
    np.add.at(counts, (place[results.labels], place[results.predicted]), 1)
    names = [classes[index] for index in shown]
    if total <= MAX_CLASSES:
        return counts[:-1, :-1], names, names
    return counts[:-1], names, [*names, OTHERS]


def draw_confusion(results: Results, classes: Sequence[str], title: str) -> bytes:
    """Draw the confusion matrix as a PNG; colours are fractions of the images of a true class."""
    import matplotlib.figure  # slow, and only needed at the end of a run

    counts, rows, columns = confusion_matrix(results, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = {name: _label(name) for name in columns}
    side = 3.2 + 0.32 * max(len(rows), 5)  # inches
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), [labels[name] for name in columns], rotation=90, parse_math=False)
    axes.set_yticks(range(len(rows)), [labels[name] for name in rows], parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    note = "" if len(rows) == len(classes) else f"\nthe {len(rows)} classes with most errors, of {len(classes):,}"
    axes.set_title(f"{title}{note}", fontsize=10, parse_math=False)
    if len(rows) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="fraction of the true class", shrink=0.7)
    encoded = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        figure.savefig(encoded, format="png", dpi=120)
    return encoded.getvalue()


def _label(name: str) -> str:
    """Return a name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
