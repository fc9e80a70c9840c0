import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden, small, tiny
from umae_jax.config import default_config
from umae_jax.models.build import build_model
from umae_jax.training.optimizer import decay_mask, layer_scales, learning_rate_schedule, make_optimizer


def test_weight_decay_applies_to_kernels_and_mask_tokens_only():
    state = nnx.state(build_model(tiny.get_config(), nnx.Rngs(0)), nnx.Param)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    decayed = dict(zip(names, jax.tree.leaves(decay_mask(state)), strict=True))
    assert {True, False} == set(decayed.values())
    for path, flag in decayed.items():
        kind = path.rsplit(".", 1)[-1]
        assert flag == (kind in ("kernel", "mask_token", "decoder_mask_token")), path


@pytest.mark.parametrize("kind", ["pvt_classifier", "vit_classifier"])
def test_no_decay_on_position_embeddings(kind):
    params = small.random_model(golden.config_of(kind))[1]
    decayed = dict(zip(names_of(params), jax.tree.leaves(decay_mask(params)), strict=True))
    assert not decayed["encoder.positions.table"]
    assert decayed["encoder.patch_embed.kernel"]


def names_of(params):
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]


def layer_index(name):
    layers = {"patch_embed": 0, "block": 1, "head": 2}
    if name not in layers:
        raise ValueError(name)
    return layers[name], 2


def test_layer_decay_scales_the_whole_update_including_weight_decay():
    params = {name: jnp.ones((2, 2)) for name in ("patch_embed", "block", "head")}
    recipe = default_config("swin_tiny", "classifier").optimizer
    directions = []
    for decay in (1.0, 0.5):
        recipe.layer_decay = decay
        optimizer = make_optimizer(recipe, layer_index)
        with jax.numpy_dtype_promotion("standard"):
            directions.append(optimizer.update(params, optimizer.init(params), params)[0])
    for name, scale in (("patch_embed", 0.25), ("block", 0.5), ("head", 1.0)):
        np.testing.assert_allclose(directions[1][name], scale * directions[0][name], rtol=1e-6)


def test_frozen_parameters_get_no_update_no_decay_and_no_state():
    params = {name: {"kernel": jnp.ones((2, 2))} for name in ("patch_embed", "block", "head")}
    recipe = default_config("swin_tiny", "classifier").optimizer
    recipe.update(weight_decay=0.5, clip_norm=1.0)
    optimizer = make_optimizer(recipe, lambda name: layer_index(name.partition(".")[0]), ("patch_embed.", "block."))
    state = optimizer.init(params)
    assert len([leaf for leaf in jax.tree.leaves(state) if leaf.shape]) == 2  # the moments of the head
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(params, state, params)
        trained = make_optimizer(recipe, lambda _: (2, 2))
        expected, _ = trained.update(
            {"head": params["head"]}, trained.init({"head": params["head"]}), {"head": params["head"]}
        )
    for name in ("patch_embed", "block"):
        np.testing.assert_array_equal(updates[name]["kernel"], 0)
    np.testing.assert_allclose(updates["head"]["kernel"], expected["head"]["kernel"])


def test_a_parameter_without_a_layer_raises():
    with pytest.raises(ValueError, match="unknown"):
        layer_scales({"unknown": jnp.ones(2)}, layer_index, 0.5)


def test_the_schedule_warms_up_linearly_and_falls_as_half_a_cosine():
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=4096, warmup_steps=100, total_steps=1100)
    peak = 1.5e-4 * 16
    steps = np.array([0, 50, 100, 350, 600, 1100])
    expected = peak * np.array([0, 0.5, 1, (1 + np.cos(np.pi / 4)) / 2, 0.5, 0])
    np.testing.assert_allclose([float(schedule(float(step))) for step in steps], expected, atol=1e-9)


def test_adamw_follows_its_formula():
    """Compare two updates with the formula of AdamW."""
    optimizer = make_optimizer(default_config().optimizer)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    gradients = [{"kernel": jnp.array([[0.1, 0.2]]), "bias": jnp.array([0.3])}] * 2
    state = optimizer.init(params)
    first, second = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    for number, gradient in enumerate(gradients, 1):
        with jax.numpy_dtype_promotion("standard"):
            direction, state = optimizer.update(gradient, state, params)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, gradient)
        for name, decay in (("kernel", 0.05), ("bias", 0.0)):
            mean, square = first[name] / (1 - 0.9**number), second[name] / (1 - 0.95**number)
            expected = mean / (jnp.sqrt(square) + 1e-8) + decay * params[name]
            np.testing.assert_allclose(direction[name], expected, rtol=1e-5)


def test_clipping_bounds_the_gradient_before_adam_sees_it():
    config = default_config()
    config.optimizer.clip_norm = 1.0
    optimizer = make_optimizer(config.optimizer)
    params = {"bias": jnp.zeros(4)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update({"bias": jnp.full(4, 50.0)}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    np.testing.assert_allclose(moments[0], 0.1 * 0.5, rtol=1e-5)


def test_the_fine_tuning_schedule_ends_at_the_final_learning_rate():
    config = default_config("swin_tiny", "classifier").optimizer
    schedule = learning_rate_schedule(config, batch_size=1024, warmup_steps=5, total_steps=100)
    np.testing.assert_allclose([float(schedule(5.0)), float(schedule(100.0))], [2e-3, 1e-6], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 5, 10])
def test_a_warm_up_may_be_missing_or_all_there_is(warmup):
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=256, warmup_steps=warmup, total_steps=10)
    assert np.isfinite([float(schedule(float(step))) for step in range(11)]).all()


def test_the_rate_drops_to_a_tenth_at_parts_of_the_run():
    recipe = default_config().optimizer.copy_and_resolve_references().unlock()
    recipe.base_learning_rate, recipe.decay_at = 1.0, (0.5, 0.8)
    rate = learning_rate_schedule(recipe, batch_size=256, warmup_steps=10, total_steps=100)
    steps = jnp.array([0, 5, 10, 49, 51, 79, 81, 99], jnp.float32)
    np.testing.assert_allclose([rate(step) for step in steps], [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
