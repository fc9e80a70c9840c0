import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden, small, tiny
from umae_jax.config import default_config
from umae_jax.models.build import build_model
from umae_jax.training.optimizer import (
    decay_mask,
    layer_number,
    layer_scales,
    learning_rate_schedule,
    make_optimizer,
)
from umae_jax.weights.names import entries


def test_no_decay_on_vectors_by_name():
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


@pytest.mark.parametrize("kind", ["swin_classifier", "pvt_classifier", "vit_classifier"])
def test_layers_are_numbered_as_the_specification_says(kind):
    """Against the reference's names, whose blocks are numbered through all stages (SPEC 10, 13)."""
    config = golden.config_of(kind)
    params = small.random_model(config)[1]
    blocks = sum(config.model.depths)
    theirs = {entry.ours: entry.theirs for entry in entries(config)}
    layers = {}
    for name in names_of(params):
        if match := re.match(r"blocks\.(\d+)\.", theirs[name]):
            layers[name] = int(match[1]) + 1
        elif theirs[name].startswith(("patch_embed", "pos_embed", "cls_token")):
            layers[name] = 0
        else:
            assert theirs[name].startswith(("head", "fc_norm"))
            layers[name] = blocks + 1
    assert {name: layer_number(name, config.model.depths) for name in layers} == layers
    assert set(layers.values()) == set(range(blocks + 2))
    scales = dict(zip(names_of(params), jax.tree.leaves(layer_scales(params, config.model.depths, 0.5)), strict=True))
    assert scales["head.kernel"] == 1
    assert scales["encoder.patch_embed.kernel"] == 0.5 ** (blocks + 1)


def test_the_rate_of_every_layer_is_scaled_decay_and_all():
    config = golden.config_of("swin_classifier")
    params = small.random_model(config)[1]
    directions = []
    for decay in (1.0, 0.75):
        config.optimizer.layer_decay = decay
        optimizer = make_optimizer(config)
        with jax.numpy_dtype_promotion("standard"):
            update = jax.jit(
                lambda params, optimizer=optimizer: optimizer.update(params, optimizer.init(params), params)
            )
            directions.append(update(params)[0])
    scales = layer_scales(params, config.model.depths, 0.75)
    jax.tree.map(
        lambda one, other, scale: np.testing.assert_allclose(other, scale * one, rtol=1e-5), *directions, scales
    )


def test_the_schedule_warms_up_linearly_and_falls_as_half_a_cosine():
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=4096, warmup_steps=100, total_steps=1100)
    peak = 1.5e-4 * 16
    steps = np.array([0, 50, 100, 350, 600, 1100])
    expected = peak * np.array([0, 0.5, 1, (1 + np.cos(np.pi / 4)) / 2, 0.5, 0])
    np.testing.assert_allclose([float(schedule(float(step))) for step in steps], expected, atol=1e-9)


def test_adamw_after_the_recipe():
    """Two updates against the formula written out."""
    optimizer = make_optimizer(default_config())
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
    optimizer = make_optimizer(config)
    params = {"bias": jnp.zeros(4)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update({"bias": jnp.full(4, 50.0)}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    np.testing.assert_allclose(moments[0], 0.1 * 0.5, rtol=1e-5)


def test_fine_tuning_ends_at_its_final_rate():
    config = default_config("swin_tiny", "classifier").optimizer
    schedule = learning_rate_schedule(config, batch_size=1024, warmup_steps=5, total_steps=100)
    np.testing.assert_allclose([float(schedule(5.0)), float(schedule(100.0))], [2e-3, 1e-6], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 5, 10])
def test_a_warm_up_may_be_missing_or_all_there_is(warmup):
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=256, warmup_steps=warmup, total_steps=10)
    assert np.isfinite([float(schedule(float(step))) for step in range(11)]).all()
