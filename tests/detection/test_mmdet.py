"""Names and layouts of mmdet, on parameters of its own HTC and on a whole detector of ours."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny_detector
from tests.detection.golden import load
from tests.detection.test_golden import OPTIONS, Heads
from tests.rngs import ConstantRngs
from umae_jax.detection.mmdet import fit_tensors, from_mmdet, is_detector, remove_prefix, to_mmdet, to_tensors
from umae_jax.tasks.detection import Task


def golden(name):
    return {key[2:]: array for key, array in load(f"{name}_params").items()}


def drawn(tree, seed=0):
    """Return parameters of these shapes, drawn at random on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


@pytest.mark.parametrize("name", OPTIONS)
def test_mmdets_own_parameters_survive_both_ways(name):
    _, shapes = nnx.split(nnx.eval_shape(lambda: Heads(OPTIONS[name], nnx.Rngs(0))))
    theirs = golden(name)
    back = to_mmdet(from_mmdet(shapes, theirs, name="golden"))
    counters = {key for key in theirs if key.endswith("num_batches_tracked")}
    assert back.keys() == theirs.keys() - counters
    for key, array in back.items():
        np.testing.assert_array_equal(array, theirs[key], err_msg=key)

    ours = drawn(shapes)
    again = dict(nnx.to_flat_state(from_mmdet(shapes, to_mmdet(ours), name="ours")))
    for keys, variable in nnx.to_flat_state(ours):
        np.testing.assert_array_equal(again[keys][...], variable[...], err_msg=str(keys))


def tiny(**model):
    """Return a configuration, and random parameters of its detector."""
    config = tiny_detector.get_config()
    config.model.update({"classes": 2, "masks": True, **model})
    shapes = nnx.state(nnx.eval_shape(lambda: Task(config).build_model(ConstantRngs())), (nnx.Param, nnx.BatchStat))
    return config, drawn(shapes)


@pytest.mark.parametrize("model", [{}, {"stages": 1, "box_convs": 0}], ids=["cascade", "one stage"])
def test_all_of_a_detector_beside_its_encoder_survives(model):
    config, params = tiny(**model)
    tensors = to_tensors(config, params)
    fitting = fit_tensors(params, tensors)
    assert (fitting.problems, fitting.unexpected) == ([], [])
    ours = dict(nnx.to_flat_state(params))
    assert {keys for keys in ours if keys not in fitting.params} == {
        keys for keys in ours if keys[:2] == ("backbone", "encoder")
    }
    for keys, variable in fitting.params.items():
        np.testing.assert_array_equal(variable[...], ours[keys][...], err_msg=str(keys))
    assert "backbone.patch_embed.proj.weight" in tensors
    assert any(key.startswith("pyramid.global_block.") for key in tensors)
    numbered = "roi_head.bbox_head.0.fc_cls.weight" in tensors
    assert numbered == (config.model.stages > 1)  # mmdet numbers the stages of a cascade
    assert ("roi_head.bbox_head.fc_cls.weight" in tensors) != numbered


def test_tensors_of_other_classes_are_named_and_the_rest_fits():
    (config, params), (_, others) = tiny(), tiny(classes=5)
    fitting = fit_tensors(others, to_tensors(config, params))
    kinds = {problem.split(" ")[0].split(".")[-2] for problem in fitting.problems}
    assert kinds == {"fc_cls", "conv_logits"}
    assert len(fitting.problems) == 2 * 2 * 2  # stages, weight and bias, boxes and masks
    assert fitting.unexpected == []


def test_a_prefix_is_removed_with_tensors_of_other_models():
    tensors = golden("htc")
    wrapped = {f"teacher.detector.{key}": array for key, array in tensors.items()} | {"optimizer.step": np.ones(1)}
    assert remove_prefix(wrapped).keys() == tensors.keys()
    assert is_detector(wrapped)
    assert is_detector(tensors)
    assert not is_detector({"patch_embed.proj.weight": np.ones(1)})
