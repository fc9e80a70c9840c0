"""Build every preset with every method, as abstract arrays (shapes only)."""

import functools

import jax
import pytest
from flax import nnx

from tests.rngs import ConstantRngs
from umae_jax import list_models
from umae_jax.config import default_config
from umae_jax.errors import UserError
from umae_jax.models.build import build_model
from umae_jax.weights.names import reference_entry

PRESETS = [(size, method) for size, methods in list_models().items() for method in methods]


@functools.cache
def abstract_params(size, method):
    config = default_config(size, method)
    return nnx.state(nnx.eval_shape(lambda: build_model(config, ConstantRngs())), nnx.Param)


@pytest.mark.parametrize(
    ("size", "method", "count"),
    [
        ("swin_tiny", "um_mae", 35_774_346),
        ("swin_tiny", "classifier", 28_268_050),
        ("pvt_small", "um_mae", 28_522_560),
    ],
)
def test_parameter_counts(size, method, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(size, method))) == count


@pytest.mark.parametrize(("size", "method"), PRESETS)
def test_every_preset_builds_and_each_parameter_has_its_own_reference_name(size, method):
    paths = {".".join(map(str, keys)) for keys, _ in nnx.to_flat_state(abstract_params(size, method))}
    config = default_config(size, method)
    assert len({reference_entry(config, path).name for path in paths}) == len(paths)


def test_only_vit_presets_have_the_mae_method():
    assert {size for size, method in PRESETS if method == "mae"} == {size for size in list_models() if "vit" in size}


@pytest.mark.parametrize(
    ("size", "method", "message"),
    [
        ("swin_giant", "um_mae", "swin_giant.*swin_tiny, "),
        ("swin_tiny", "mae", "'mae'.*swin_tiny.*um_mae, simmim, classifier$"),
        ("vit_base", "mim", "'mim'.*vit_base.*um_mae, mae, simmim, classifier$"),
    ],
)
def test_an_unknown_preset_is_named_with_the_known_ones(size, method, message):
    with pytest.raises(UserError, match=message):
        default_config(size, method)
