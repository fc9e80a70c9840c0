import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from umae_jax.config import default_config
from umae_jax.models.build import build_model
from umae_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def test_no_decay_on_vectors_by_name():
    state = nnx.state(build_model(tiny.get_config(), nnx.Rngs(0)), nnx.Param)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    decayed = dict(zip(names, jax.tree.leaves(decay_mask(state)), strict=True))
    assert {True, False} == set(decayed.values())
    for path, flag in decayed.items():
        kind = path.rsplit(".", 1)[-1]
        assert flag == (kind in ("kernel", "mask_token", "decoder_mask_token")), path


def test_the_schedule_warms_up_linearly_and_falls_as_half_a_cosine():
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=4096, warmup_steps=100, total_steps=1100)
    peak = 1.5e-4 * 16
    steps = np.array([0, 50, 100, 350, 600, 1100])
    expected = peak * np.array([0, 0.5, 1, (1 + np.cos(np.pi / 4)) / 2, 0.5, 0])
    np.testing.assert_allclose([float(schedule(float(step))) for step in steps], expected, atol=1e-9)


def test_adamw_after_the_recipe():
    """Two updates against the formula written out."""
    config = default_config().optimizer
    optimizer = make_optimizer(config)
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
    config = default_config().optimizer
    config.clip_norm = 1.0
    optimizer = make_optimizer(config)
    params = {"bias": jnp.zeros(4)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update({"bias": jnp.full(4, 50.0)}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    np.testing.assert_allclose(moments[0], 0.1 * 0.5, rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 5, 10])
def test_a_warm_up_may_be_missing_or_all_there_is(warmup):
    schedule = learning_rate_schedule(default_config().optimizer, batch_size=256, warmup_steps=warmup, total_steps=10)
    assert np.isfinite([float(schedule(float(step))) for step in range(11)]).all()
