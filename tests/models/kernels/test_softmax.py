"""The hand-written gradient and its branch on logit size against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax.models import attention
from umae_jax.models.kernels import softmax
from umae_jax.models.kernels.packed_windows import windows_per_tile
from umae_jax.models.kernels.platforms import tracing_for
from umae_jax.models.kernels.softmax import attend
from umae_jax.training.sharding import batch_sharding, make_mesh


def inputs(dtype, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((2, 3, 2, 8, 5), (2, 3, 2, 8, 7), (2, 3, 2, 8, 7))  # [batch, windows, heads, d, queries or keys]
    q, k, v = (scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    bias = jax.random.normal(keys[3], (1, 3, 2, 7, 5))
    gradient = jax.random.normal(keys[4], (2, 3, 2, 8, 5))
    return tuple(x.astype(dtype) for x in (q, k, v)), bias, gradient.astype(dtype)


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Trace for a CPU, and as for TPUs but run here: the numbers are the same."""
    monkeypatch.setattr(softmax, "tracing_for", lambda platform: (platform == "tpu") == (request.param == "tpu"))
    jax.clear_caches()  # traces do not depend on tracing_for
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1, 3])  # of small logits, and of large ones
def test_values_and_gradients_equal_the_plain_form_s(platform, dtype, tolerance, biased, scale):
    (q, k, v), bias, gradient = inputs(dtype, scale)
    arguments = (q, k, v, bias) if biased else (q, k, v)

    def both(function, *arguments):
        values, pull = jax.vjp(function, *arguments)
        return values, pull(gradient)

    computed = (jax.jit(lambda *x, f=f: both(f, *x))(*arguments) for f in (attend, attention.attend))
    for our, their in zip(*map(jax.tree.leaves, computed), strict=True):
        assert our.dtype == their.dtype
        our, their = (np.asarray(x, np.float32) for x in (our, their))
        np.testing.assert_allclose(our, their, atol=tolerance * max(1, np.abs(their).max()))


def test_large_logits_do_not_overflow(platform):
    (q, k, v), bias, _ = inputs("float32", scale=100.0)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), jax.jit(attention.attend)(q, k, v), rtol=1e-4, atol=1e-3)
    small, bias = q / 1e4, 300 * bias
    np.testing.assert_allclose(
        jax.jit(attend)(small, k, v, bias), jax.jit(attention.attend)(small, k, v, bias), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("length", [49.9, 50.1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_unshifted_logits_lose_no_precision(platform, length, sign):
    """All keys are alike, so that every logit is the bound itself."""
    q, v = jnp.full((1, 4, 3), length / 2), jax.random.normal(jax.random.key(0), (1, 4, 256))
    k = jnp.full((1, 4, 256), float(sign))
    values, pull = jax.vjp(jax.jit(attend), q, k, v)
    np.testing.assert_allclose(values, jnp.broadcast_to(v.mean(-1, keepdims=True), values.shape), rtol=1e-5, atol=1e-6)
    _, _, grad_v = pull(jnp.full_like(values, 1e-12))
    np.testing.assert_allclose(grad_v, jnp.full_like(v, 3e-12 / 256), rtol=1e-5)


def test_on_tpus_only_small_logits_skip_the_pass_for_their_maximum(monkeypatch):
    branches_taken = []
    branch = jax.lax.cond

    def cond(small, *branches):
        branches_taken.append(bool(small))
        return branch(small, *branches)

    monkeypatch.setattr(softmax, "tracing_for", lambda platform: platform == "tpu")
    monkeypatch.setattr(jax.lax, "cond", cond)
    (q, k, v), bias, _ = inputs("float32")
    attend(q, k, v, bias)
    attend(3 * q, 3 * k, v, bias)
    attend(q, k, v, 20 * bias)
    attend(q.at[0, 0, 0, 0, 0].set(jnp.nan), k, v, bias)
    scale = jnp.ones((1, 3, 2, 1, 1)).at[:, 0, 1].set(20)  # a head whose queries are long, and keys short
    attend(q * scale, k / scale, v, bias)
    assert branches_taken == [True, False, False, False, True]


def test_the_mesh_says_which_platform_is_traced_for(tpus):
    mesh = make_mesh(1, tpus)
    (q, k, v), _, _ = inputs("float32")
    q, k, v = (jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh)) for x in (q, k, v))
    for here, known in ((mesh, True), (make_mesh(), False)):
        with jax.set_mesh(here):
            assert tracing_for("tpu") == known
            assert tracing_for("cpu") != known
            assert windows_per_tile(4, 64) == (2 if known else 1)
    with jax.set_mesh(mesh):
        assert "stablehlo.case" in jax.jit(lambda *x: attend(*x)).lower(q, k, v).as_text()
