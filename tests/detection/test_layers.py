"""Layers of the heads, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.detection.layers import EPSILON, MOMENTUM, BatchNorm, conv

ROWS, SIDE, WIDTH = 6, 3, 4
VALID = np.array([True, False, True, True, False, True])


def features(seed=0):
    return np.random.default_rng(seed).normal(2, 3, (ROWS, SIDE, SIDE, WIDTH)).astype(np.float32)


def norm_of(scale=1.5, bias=-0.5):
    norm = BatchNorm(WIDTH)
    norm.scale[...], norm.bias[...] = jnp.full(WIDTH, scale), jnp.full(WIDTH, bias)
    return norm


def test_batch_norm_takes_the_statistics_of_valid_rows():
    norm, x = norm_of(), features()
    y = norm(jnp.asarray(x), jnp.asarray(VALID), train=True)
    mean, var = x[VALID].mean((0, 1, 2)), x[VALID].var((0, 1, 2))
    np.testing.assert_allclose(y, 1.5 * (x - mean) / np.sqrt(var + EPSILON) - 0.5, atol=1e-5)
    count = VALID.sum() * SIDE**2
    np.testing.assert_allclose(norm.mean[...], MOMENTUM * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 1 - MOMENTUM + MOMENTUM * var * count / (count - 1), rtol=1e-5)


def test_batch_norm_uses_and_keeps_running_statistics_in_evaluation():
    norm, x = norm_of(), features()
    norm.mean[...], norm.var[...] = jnp.full(WIDTH, 3.0), jnp.full(WIDTH, 4.0)
    y = norm(jnp.asarray(x), jnp.asarray(VALID), train=False)
    np.testing.assert_allclose(y, 1.5 * (x - 3) / np.sqrt(4 + EPSILON) - 0.5, atol=1e-5)
    assert (np.asarray(norm.mean[...]) == 3).all()
    assert (np.asarray(norm.var[...]) == 4).all()


def test_invalid_rows_change_no_other_row_and_no_gradient():
    x = features()
    other = np.where(VALID[:, None, None, None], x, features(1))

    def loss(x):
        norm = norm_of()
        y = norm(x, jnp.asarray(VALID), train=True)
        return (jnp.where(jnp.asarray(VALID)[:, None, None, None], y, 0) ** 3).sum(), (norm.mean[...], norm.var[...], y)

    (value, kept), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(x))
    (changed, others), changed_gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(other))
    assert value == changed
    for ours, theirs in zip(kept[:2], others[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(kept[2][VALID], others[2][VALID])
    np.testing.assert_array_equal(gradient[VALID], changed_gradient[VALID])
    assert np.abs(gradient[~VALID]).max() == np.abs(changed_gradient[~VALID]).max() == 0
    assert np.abs(gradient[VALID]).max() > 0


def test_without_valid_rows_all_stays_finite():
    norm = norm_of()
    y = norm(jnp.asarray(features()), jnp.zeros(ROWS, bool), train=True)
    assert np.isfinite(y).all()
    assert np.isfinite(norm.var[...]).all()


@pytest.mark.parametrize("side", [1, 3])
def test_convolutions_keep_the_size_and_start_he_normal_by_fan_out(side):
    layer = conv(8, 64, side, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = layer(jnp.ones((2, 5, 7, 8)))
    assert (y.shape, y.dtype) == ((2, 5, 7, 64), jnp.bfloat16)
    kernel = np.asarray(layer.kernel[...])
    assert kernel.dtype == np.float32
    assert kernel.std() == pytest.approx(np.sqrt(2 / (side**2 * 64)), rel=0.1)
    assert np.abs(layer.bias[...]).max() == 0
