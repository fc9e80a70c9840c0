import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import golden, small
from umae_jax.data.on_device import normalize
from umae_jax.data.pipeline import Batch
from umae_jax.errors import UserError
from umae_jax.models.layers import resize_positions
from umae_jax.positions import sincos_table
from umae_jax.training.finetuning import adapt_pretrained, make_loss
from umae_jax.training.step import init_state, make_train_step

PAIRS = {"swin_um_window4_no_secondary": "swin_classifier", "pvt_um": "pvt_classifier", "vit_um": "vit_classifier"}


def batch_of(count=4, side=64, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = rng.integers(10, size=count).astype(np.int32)
    return Batch(images, np.arange(count, dtype=np.uint32), labels, np.zeros(count, np.int32))


def filled_with(params, given):
    """Parameters with some of them replaced."""
    return nnx.from_flat_state({**dict(nnx.to_flat_state(params)), **dict(nnx.to_flat_state(given))})


@pytest.mark.parametrize("pretrained", PAIRS)
def test_a_classifier_takes_the_encoder_and_keeps_its_own_head(pretrained):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    graph, theirs = small.random_model(source)
    classifier, ours = small.random_model(config, seed=1)
    filled = filled_with(ours, adapt_pretrained(config, ours["encoder"], source, theirs["encoder"], "DIR"))
    images = jax.random.normal(jax.random.key(0), (1, *config.image_size, 3))

    @jax.jit
    def feature(model, images):
        return model.encoder(model.encoder.embed(images)).maps[0]

    # The first stage's map has seen no norm that only one of the two has.
    ours_first, theirs_first = (feature(nnx.merge(*parts), images) for parts in ((classifier, filled), (graph, theirs)))
    if len(config.model.depths) > 1:
        np.testing.assert_allclose(ours_first, theirs_first, atol=1e-5)
    else:
        norm = nnx.merge(graph, theirs).encoder.norm
        np.testing.assert_allclose(norm(ours_first), theirs_first, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, filled["head"], ours["head"])
    jax.tree.map(np.testing.assert_array_equal, filled["head_norm"], ours["head_norm"])


@pytest.mark.parametrize(("pretrained", "leading"), [("pvt_um", 0), ("vit_um", 1)])
def test_position_tables_are_resized_to_other_images(pretrained, leading):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    config.image_size = tuple(2 * size for size in source.image_size)
    wanted = small.random_model(config)[1]["encoder"]
    fitted = adapt_pretrained(config, wanted, source, small.random_model(source)[1]["encoder"], "DIR")
    table = np.asarray(fitted["encoder"]["positions"]["table"][...])
    old, new = ([size // source.model.patch for size in image] for image in (source.image_size, config.image_size))
    width = source.model.widths[0]
    assert table.shape == (1, leading + new[0] * new[1], width)
    np.testing.assert_array_equal(table[:, :leading], 0)
    # Each old place lies between four new ones, whose mean is close to its own.
    means = table[0, leading:].reshape(old[0], 2, old[1], 2, width).mean((1, 3))
    inner = slice(1, -1)
    np.testing.assert_allclose(means[inner, inner], sincos_table(width, old)[inner, inner], atol=0.08)


def test_a_table_of_the_same_grid_is_kept_as_it_is():
    table = jax.random.normal(jax.random.key(0), (1, 13, 8))
    assert resize_positions(table, (3, 4), (3, 4), leading=1) is table


@pytest.mark.parametrize(
    ("key", "value"),
    [("widths", (16, 32, 64, 64)), ("depths", (2, 2, 1, 2)), ("heads", (2, 2, 4, 8)), ("position_width", 4)],
)
def test_sizes_that_do_not_fit_are_named(key, value):
    source, config = golden.config_of("swin_um_window8"), golden.config_of("swin_classifier")
    params = small.random_model(source)[1]["encoder"]
    mine = source.model[key]
    config.model[key] = value
    with pytest.raises(UserError, match=rf"init: DIR holds an encoder of other sizes \(model.{key} is") as told:
        adapt_pretrained(config, params, source, params, "DIR")
    assert str(mine) in str(told.value)
    assert str(value) in str(told.value)


def plain(config):
    config.augment.update(operations=0, erase=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    return config


def test_without_augmentation_the_loss_is_cross_entropy_of_flipped_images():
    config = plain(golden.config_of("vit_classifier"))
    config.model.drop_path = 0.0
    graph, params = small.random_model(config)
    batch = batch_of()
    model = nnx.merge(graph, params)

    @jax.jit
    def losses(images):
        logits = model(normalize(images, config.data.mean, config.data.std))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)

    straight, flipped = losses(batch.image), losses(batch.image[:, :, ::-1])
    found = float(jax.jit(make_loss(config, graph))(params, batch))
    means = {
        float(jnp.where(np.array([bool(number >> place & 1) for place in range(4)]), flipped, straight).mean())
        for number in range(16)
    }
    assert min(abs(found - mean) for mean in means) < 1e-5


def test_the_recipe_gives_a_finite_loss_and_every_parameter_a_gradient():
    config = golden.config_of("vit_classifier")
    assert config.augment.to_dict() == {
        "operations": 2,
        "magnitude": 9.0,
        "magnitude_std": 0.5,
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    graph, params = small.random_model(config)
    loss, gradient = jax.jit(jax.value_and_grad(make_loss(config, graph)))(params, batch_of())
    assert np.isfinite(loss)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_accumulated_parts_mix_the_same_pairs():
    config = golden.config_of("vit_classifier")
    graph, params = small.random_model(config)
    optimizer = optax.identity()
    results = []
    for parts in (1, 2, 4):
        step = jax.jit(make_train_step(make_loss(config, graph), optimizer, lambda step: 0.1, grad_accum_steps=parts))
        state, metrics = step(init_state(params, optimizer), jax.tree.map(jnp.asarray, batch_of(8)))
        results.append((metrics.loss, state.params["head"]["kernel"][...]))
    for loss, kernel in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        np.testing.assert_allclose(kernel, results[0][1], atol=1e-5)


def test_the_average_follows_the_parameters():
    optimizer = optax.identity()
    params = {"x": jnp.array([1.0, 2.0])}
    state = init_state(params, optimizer, average=True)
    batch = batch_of()
    step = jax.jit(make_train_step(lambda p, b: p["x"].sum(), optimizer, lambda step: 0.1, average=0.9))
    expected = np.array([1.0, 2.0])
    for number in range(1, 4):
        state, _ = step(state, batch)
        expected = 0.9 * expected + 0.1 * (np.array([1.0, 2.0]) - 0.1 * number)
        np.testing.assert_allclose(state.result["x"], expected, rtol=1e-6)
    assert init_state(params, optimizer).result is params


def test_the_average_stays_finite_where_an_update_is_skipped():
    optimizer = optax.identity()
    state = init_state({"x": jnp.ones(2)}, optimizer, average=True)
    step = jax.jit(make_train_step(lambda p, b: p["x"].sum() * jnp.inf, optimizer, lambda step: 0.1, average=0.9))
    state, metrics = step(state, batch_of())
    assert int(metrics.skipped_updates) == 1
    np.testing.assert_array_equal(state.result["x"], np.ones(2))
