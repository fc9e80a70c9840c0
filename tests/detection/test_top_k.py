import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.detection.top_k import top_k


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 7), (300, 1), (300, 40), (5000, 2000)])
@pytest.mark.parametrize("kind", ["normal", "ties", "whole", "infinite"])
def test_numbers_and_places_equal_those_of_a_sort(size, count, kind):
    rng = np.random.default_rng(size + count)
    x = rng.normal(size=size).astype(np.float32)
    if kind == "ties":
        x = np.round(2 * x) * np.float32(0.5)  # zeros of both signs
    if kind == "whole":
        x = rng.integers(-(2**31), 2**31, size, dtype=np.int64).astype(np.int32)
    if kind == "infinite":
        x[rng.random(size) < 0.7] = -np.inf
    ours, theirs = jax.jit(top_k, static_argnums=1)(jnp.asarray(x), count), jax.lax.top_k(jnp.asarray(x), count)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_a_batch_equals_its_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 500)), jnp.float32)
    values, places = jax.jit(jax.vmap(lambda row: top_k(row, 30)))(x)
    expected = jax.lax.top_k(x, 30)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(places, expected[1])
