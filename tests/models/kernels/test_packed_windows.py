"""Attention within windows, packed for TPUs or not, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.masking import sample_uniform_mask
from umae_jax.models import attention
from umae_jax.models.kernels import packed_windows
from umae_jax.models.windows import make_windows
from umae_jax.positions import select_offset_case
from umae_jax.training.sharding import make_mesh


@pytest.mark.parametrize("packed", [1, 2, 4])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_values_and_gradients_equal_the_plain_form_s(monkeypatch, packed, compact, shifted):
    monkeypatch.setattr(packed_windows, "windows_per_tile", lambda windows, tokens: packed)
    heads, (qkv, proj) = 3, (nnx.Linear(24, features, rngs=nnx.Rngs(features)) for features in (72, 24))
    graph, state = nnx.split((qkv, proj))
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (2, 16, 12, 24))
    offset = sample_uniform_mask(keys[1], 2, (4, 3), 0.25).offset if compact else None
    cases = make_windows((16, 12), 4, shifted=shifted, offset=offset).differences.shape[:2]
    tables = jax.random.normal(keys[2], (*cases, heads, 16, 16))

    def both(function):
        def run(state, x, tables):
            windows = make_windows((16, 12), 4, shifted=shifted, offset=offset)
            return function(*nnx.merge(graph, state), x, windows, tables, heads)

        out, pull = jax.vjp(run, state, x, tables)
        return out, pull(jnp.cos(out))

    computed = (jax.jit(lambda f=f: both(f.window_attention))() for f in (packed_windows, attention))
    for our, plain in zip(*map(jax.tree.leaves, computed), strict=True):
        np.testing.assert_allclose(our, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windows", [1, 4])
def test_the_gradient_for_cpus_sums_each_case(windows):
    keys = jax.random.split(jax.random.key(0), 4)
    tables = jax.random.normal(keys[0], (9, windows, 3, 5, 6))
    row, column = (jax.random.randint(key, (8, 4, 5, 6), -1, 2, jnp.int8) for key in keys[1:3])
    gradient = jax.random.normal(keys[3], (8, 4, 3, 5, 6))

    def both(select):
        @jax.jit
        def run(tables, row, column):
            selected, pull = jax.vjp(lambda tables: select(tables, row, column), tables)
            return selected, *pull(gradient)

        return run(tables, row, column)

    selected, grad_tables = both(select_offset_case)
    with jax.set_mesh(make_mesh()):
        selected_on_cpu, grad_on_cpu = both(packed_windows._select_offset_case_on_cpu)
    np.testing.assert_array_equal(selected_on_cpu, selected)
    np.testing.assert_allclose(grad_on_cpu, grad_tables, rtol=1e-5, atol=1e-5)
    case = np.asarray(3 * row + column + 4)
    for number in range(9):
        share = np.where((case == number)[:, :, None], gradient, 0).sum(0)
        share = share.sum(0, keepdims=True) if windows == 1 else share
        np.testing.assert_allclose(grad_on_cpu[number], share, rtol=1e-5, atol=1e-5)
