import io
import math

from PIL import Image

from umae_jax.training import curves
from umae_jax.training.metrics import MetricsWriter


def lines_of(monkeypatch, workdir, accuracies):
    """Return the labels and points of the lines that are drawn."""
    drawn = {}

    def spy(lines, name):
        drawn[name] = points(lines, name)
        return drawn[name]

    points = curves._points
    monkeypatch.setattr(curves, "_points", spy)
    png = curves.draw_curves(workdir, accuracies)
    with Image.open(io.BytesIO(png)) as picture:
        return drawn, picture.height


def test_covers_a_run_that_continues_and_leaves_out_what_was_not_measured(tmp_path, monkeypatch):
    for first, last in ((0, 4), (2, 6)):
        writer = MetricsWriter(tmp_path, first)
        for step in range(first + 1, last + 1):
            loss = math.nan if step == 5 else 1 / step
            writer.write(step, {"loss": loss, "learning_rate": step / 100})
        writer.write(last, {"knn_top1": last / 10})
        writer.close()
    drawn, height = lines_of(monkeypatch, tmp_path, ("knn_top1", "validation_top1"))
    assert [step for step, _ in drawn["loss"]] == [1, 2, 3, 4, 5, 6]
    assert math.isnan(drawn["loss"][4][1])
    assert drawn["learning_rate"][-1] == (6, 0.06)
    assert drawn["knn_top1"] == [(6, 0.6)]
    assert drawn["validation_top1"] == []
    monkeypatch.undo()
    assert lines_of(monkeypatch, tmp_path, ())[1] < height  # no panel of accuracies


def test_nothing_is_drawn_before_the_first_loss(tmp_path):
    assert curves.draw_curves(tmp_path, ()) is None
