import jax
import numpy as np
import pytest
from flax import nnx

from tests import golden, small
from umae_jax.errors import UserError
from umae_jax.features import PretrainedParams
from umae_jax.models.positions_table import resize_positions
from umae_jax.positions import sincos_table
from umae_jax.tasks.initialization import adapt_pretrained, describe_loaded

PAIRS = {"swin_um_window4_no_secondary": "swin_classifier", "pvt_um": "pvt_classifier", "vit_um": "vit_classifier"}


def replace_params(params, new):
    """Return `params` with those in `new` replaced."""
    return nnx.from_flat_state({**dict(nnx.to_flat_state(params)), **dict(nnx.to_flat_state(new))})


@pytest.mark.parametrize("pretrained", PAIRS)
def test_a_classifier_gets_the_pretrained_encoder_and_keeps_its_own_head(pretrained):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    graph, theirs = small.random_model(source)
    classifier, ours = small.random_model(config, seed=1)
    filled = replace_params(ours, adapt_pretrained(config, ours["encoder"], source, theirs["encoder"]))
    images = jax.random.normal(jax.random.key(0), (1, *config.image_size, 3))

    @jax.jit
    def feature(model, images):
        return model.encoder(model.encoder.embed(images)).maps[0]

    # The encoders differ only in the final norm, which maps of earlier stages do not pass through.
    ours_first, theirs_first = (feature(nnx.merge(*parts), images) for parts in ((classifier, filled), (graph, theirs)))
    if len(config.model.depths) > 1:
        np.testing.assert_allclose(ours_first, theirs_first, atol=1e-5)
    else:
        norm = nnx.merge(graph, theirs).encoder.norm
        np.testing.assert_allclose(norm(ours_first), theirs_first, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, filled["head"], ours["head"])
    jax.tree.map(np.testing.assert_array_equal, filled["head_norm"], ours["head_norm"])


@pytest.mark.parametrize(("pretrained", "leading"), [("pvt_um", 0), ("vit_um", 1)])
def test_position_tables_are_resized_to_another_image_size(pretrained, leading):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    config.image_size = tuple(2 * size for size in source.image_size)
    initial = small.random_model(config)[1]["encoder"]
    adapted = adapt_pretrained(config, initial, source, small.random_model(source)[1]["encoder"])
    table = np.asarray(adapted["encoder"]["positions"]["table"][...])
    old, new = ([size // source.model.patch for size in image] for image in (source.image_size, config.image_size))
    width = source.model.widths[0]
    assert table.shape == (1, leading + new[0] * new[1], width)
    np.testing.assert_array_equal(table[:, :leading], 0)
    # Each old position lies between four new ones, whose mean is close to its embedding.
    means = table[0, leading:].reshape(old[0], 2, old[1], 2, width).mean((1, 3))
    inner = slice(1, -1)
    np.testing.assert_allclose(means[inner, inner], sincos_table(width, old)[inner, inner], atol=0.08)


def test_a_position_table_of_the_same_grid_is_unchanged():
    table = jax.random.normal(jax.random.key(0), (1, 13, 8))
    assert resize_positions(table, (3, 4), (3, 4), leading=1) is table


@pytest.mark.parametrize(
    ("key", "value"),
    [("widths", (16, 32, 64, 64)), ("depths", (2, 2, 1, 2)), ("heads", (2, 2, 4, 8)), ("position_width", 4)],
)
def test_encoder_sizes_that_do_not_match_are_named(key, value):
    source, config = golden.config_of("swin_um_window8"), golden.config_of("swin_classifier")
    params = small.random_model(source)[1]["encoder"]
    config.model[key], config.init = value, "DIR"
    with pytest.raises(UserError, match=rf"init: DIR holds an encoder of other sizes \(model.{key} is") as error:
        adapt_pretrained(config, params, source, params)
    assert f"{source.model[key]}, not {value}" in str(error.value)


def described(pretrained, config, step=7):
    """Return the lines about a classifier that starts from a pre-trained encoder."""
    ours, theirs = small.random_model(config)[1], small.random_model(pretrained)[1]["encoder"]
    loaded = adapt_pretrained(config, ours["encoder"], pretrained, theirs)
    return list(describe_loaded(config, ours, PretrainedParams(pretrained, theirs, "DIR", step), loaded))


def test_the_loaded_new_and_unused_tensors_are_named():
    config = golden.config_of("swin_classifier")
    config.model.window = golden.config_of("swin_um_window4_no_secondary").model.window
    config.image_size = golden.config_of("swin_um_window4_no_secondary").image_size
    (line,) = described(golden.config_of("swin_um_window4_no_secondary"), config)
    count = len(nnx.to_flat_state(small.random_model(config)[1]["encoder"]))
    assert line.startswith(f"init: loaded {count} tensors of the encoder from DIR, step 7 (um_mae); new: head")
    assert "head_norm; not used: encoder.norm" in line
    assert "step" not in described(golden.config_of("swin_um_window4_no_secondary"), config, step=None)[0]


def test_adapted_positions_windows_and_normalisation_are_named():
    pretrained, config = golden.config_of("vit_um"), golden.config_of("vit_classifier")
    config.image_size = tuple(2 * side for side in pretrained.image_size)
    config.data.mean = (0.5, 0.5, 0.5)
    side = pretrained.image_size[0] // config.model.patch
    adapted = described(pretrained, config)[1]
    assert f"positions resized from {side} x {side} to {2 * side} x {2 * side} tokens" in adapted
    assert "data.mean differs" in adapted
    pretrained, config = golden.config_of("swin_um_window8"), golden.config_of("swin_classifier")
    config.model.window = 2 * pretrained.model.window
    before, after = pretrained.model.window, config.model.window
    assert f"model.window changed from {before} to {after}" in described(pretrained, config)[1]
