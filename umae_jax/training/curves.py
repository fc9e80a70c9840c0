"""A picture of a run's metrics over its steps."""

import io
from collections.abc import Sequence
from typing import Any

from umae_jax.files import AnyPath
from umae_jax.training.metrics import read_metrics


def draw_curves(workdir: AnyPath, accuracies: Sequence[str]) -> bytes | None:
    """Draw the loss, the learning rate and accuracies of a whole run as a PNG, from its metrics.jsonl.

    Each point of the loss is of one batch, not a mean over the steps since the last point.

    Args:
        workdir: the run's directory.
        accuracies: names of metrics in [0, 1]; those that were never measured are left out.

    Returns:
        The PNG, or None if no loss is logged yet.
    """
    import matplotlib.figure  # slow, and most commands draw no curve

    lines = list(read_metrics(workdir))
    loss, rate = _points(lines, "loss"), _points(lines, "learning_rate")
    measured = {name: points for name in accuracies if (points := _points(lines, name))}
    if not loss:
        return None
    panels = 2 if measured else 1
    figure = matplotlib.figure.Figure(figsize=(8, 1 + 3 * panels), layout="constrained")
    above, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    above.plot(*zip(*loss, strict=True), color="C0", linewidth=1, label="loss")
    above.set_ylabel("loss of one batch", color="C0")
    above.grid(alpha=0.3)
    right = above.twinx()
    right.plot(*zip(*rate, strict=True), color="C1", linewidth=1, label="learning rate")
    right.set_ylabel("learning rate", color="C1")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", scilimits=(-2, 2))
    for axes in below:
        for name, points in measured.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=name)
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
        axes.legend()
    (below or [above])[-1].set_xlabel("step")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=120)
    return encoded.getvalue()


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return step and value of each line with a metric; NaN and infinity, which are strings, leave gaps."""
    return [(line["step"], float(line[name])) for line in lines if name in line]
