"""Batches of annotated images for evaluation."""

import jax
import numpy as np

from tests import annotated_images, smallest_detector
from umae_jax.data.annotations import open_annotated
from umae_jax.data.pipeline import Readers
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
