"""Build every preset with every method, as abstract arrays (shapes only)."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.rngs import ConstantRngs
from umae_jax import list_models
from umae_jax.config import default_config
from umae_jax.detection.mmdet import to_tensors
from umae_jax.errors import UserError
from umae_jax.tasks import make_task
from umae_jax.weights.names import reference_entry

PRESETS = [(size, method) for size, methods in list_models().items() for method in methods]


@functools.cache
def abstract_model(size, method):
    """Return the configuration of a preset and its parameters in shapes."""
    task = make_task(default_config(size, method))
    task.assume_data()
    return task.config, nnx.state(nnx.eval_shape(lambda: task.build_model(ConstantRngs())), (nnx.Param, nnx.BatchStat))


@pytest.mark.parametrize(
    ("size", "method", "count"),
    [
        ("swin_tiny", "um_mae", 35_774_346),
        ("swin_tiny", "classifier", 28_268_050),
        ("pvt_small", "um_mae", 28_522_560),
    ],
)
def test_parameter_counts(size, method, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_model(size, method)[1])) == count


@pytest.mark.parametrize(("size", "method"), [preset for preset in PRESETS if preset != ("vit_huge", "detector")])
def test_every_preset_builds_and_each_parameter_has_its_own_name(size, method):
    config, params = abstract_model(size, method)
    if method == "detector":
        empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
        names = to_tensors(config, empty).keys()
    else:
        names = {reference_entry(config, ".".join(map(str, keys))).name for keys, _ in nnx.to_flat_state(params)}
    assert len(names) == len(nnx.to_flat_state(params))


def test_no_canvas_is_a_multiple_of_14_and_32_pixels():
    with pytest.raises(UserError, match=r"^image_size: the height 1408 is not a multiple of 14"):
        abstract_model("vit_huge", "detector")


def test_only_vit_presets_have_the_mae_method():
    assert {size for size, method in PRESETS if method == "mae"} == {size for size in list_models() if "vit" in size}


@pytest.mark.parametrize(
    ("size", "method", "message"),
    [
        ("swin_giant", "um_mae", "swin_giant.*swin_tiny, "),
        ("swin_tiny", "mae", "'mae'.*swin_tiny.*um_mae, simmim, classifier, detector$"),
        ("vit_base", "mim", "'mim'.*vit_base.*um_mae, mae, simmim, classifier, detector$"),
    ],
)
def test_an_unknown_preset_is_named_with_the_known_ones(size, method, message):
    with pytest.raises(UserError, match=message):
        default_config(size, method)
