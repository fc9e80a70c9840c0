"""Canvases of annotated images, and their batches for evaluation."""

import jax
import numpy as np
import pytest

from tests import annotated_images, smallest_detector
from umae_jax.data.annotations import open_annotated
from umae_jax.data.pipeline import Readers
from umae_jax.errors import UserError
from umae_jax.tasks import annotated
from umae_jax.training.memory import tree_bytes
from umae_jax.training.sharding import make_mesh


def test_shared_memory_of_workers_is_planned_for_all_views(tmp_path, monkeypatch):
    """Workers pass on all views of an image, of which those of `validation.scales` may be larger than the first."""
    planned = []
    monkeypatch.setattr(annotated, "readers", lambda config, size: planned.append(size) or Readers(1))
    config = smallest_detector.get_config()
    config.validation.scales = (32, 160)
    source = open_annotated(annotated_images.write(tmp_path, annotated_images.coco()))
    (group,) = annotated.groups(config, source)
    mesh = make_mesh(devices=jax.devices()[:2])
    (batch, *_) = annotated.eval_loader(config, group, mesh, 2, set())
    del batch["valid"]
    assert planned == [sum(np.asarray(array).nbytes for array in batch.values()) // 2]
    assert planned[0] > 3 * (64**2 + 32**2 + 160**2)
    shapes = annotated.abstract_eval_batch(config, group.canvas, mesh, 2)
    assert {name: (shapes[name].shape, shapes[name].dtype) for name in batch} == {
        name: (array.shape, array.dtype) for name, array in batch.items()
    }
    assert tree_bytes(annotated.eval_arrays(config, group.canvas)) == planned[0]


@pytest.mark.parametrize(
    ("heights", "widths", "message"),
    [
        ((64, 96), (96,), r"^data.canvas_widths has 1 number\(s\), data.canvas_heights 2"),
        ((100,), (128,), r"^data.canvas_heights, .*100 x 128 .*multiples of 32"),
        ((128,), (96,), r"^data.canvas_heights, .*128 x 96 is no canvas"),
        ((96, 64), (128, 128), r"^data.canvas_heights, data.canvas_widths: .* must ascend"),
    ],
)
def test_wrong_canvases_are_named(heights, widths, message):
    config = smallest_detector.get_config()
    config.data.canvas_heights, config.data.canvas_widths = heights, widths
    config.image_size = (heights[-1], widths[-1])
    with pytest.raises(UserError, match=message):
        annotated.canvases(config)


@pytest.mark.parametrize("edges", [(48, 80), (64, 48)])
def test_ranges_lie_within_the_largest_canvas(edges):
    config = smallest_detector.get_config()
    config.data.short_edge = edges
    with pytest.raises(UserError, match=rf"^data.short_edge: \({edges[0]}, {edges[1]}\) .* up to 64"):
        annotated.check_ranges(config)
