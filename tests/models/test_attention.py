"""Attention, laid out and differentiated by hand, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.models import attention
from umae_jax.models.attention import Bias, attend, merge_heads, split_heads
from umae_jax.models.kernels.platforms import is_for
from umae_jax.models.windows import make_windows
from umae_jax.training.sharding import batch_sharding, make_mesh


def plain(q, k, v, bias=None):
    logits = jnp.einsum("...dq,...dk->...qk", q, k, preferred_element_type=jnp.float32) * q.shape[-2] ** -0.5
    if bias is not None:
        logits = logits + jnp.swapaxes(bias, -1, -2)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("...qk,...dk->...dq", weights, v)


def inputs(dtype, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((2, 3, 2, 8, 5), (2, 3, 2, 8, 7), (2, 3, 2, 8, 7))  # [batch, windows, heads, d, queries or keys]
    q, k, v = (scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    bias = jax.random.normal(keys[3], (1, 3, 2, 7, 5))
    gradient = jax.random.normal(keys[4], (2, 3, 2, 8, 5))
    return tuple(x.astype(dtype) for x in (q, k, v)), bias, gradient.astype(dtype)


def ours(q, k, v, bias=None):
    return attend(q, k, v, None if bias is None else Bias(bias))


@pytest.fixture(params=["here", "TPUs"])
def platform(request, monkeypatch):
    """What is done for TPUs gives the same numbers elsewhere, too."""
    monkeypatch.setattr(attention, "is_for", lambda platform: (platform == "tpu") == (request.param == "TPUs"))
    jax.clear_caches()  # a trace does not know what it was made for
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1, 3])  # of logits that are known to be small, and of such that are not
def test_values_and_gradients_are_those_of_the_plain_form(platform, dtype, tolerance, biased, scale):
    (q, k, v), bias, gradient = inputs(dtype, scale)
    arguments = (q, k, v, bias) if biased else (q, k, v)

    def both(function, *arguments):
        values, pull = jax.vjp(function, *arguments)
        return values, pull(gradient)

    found = (jax.jit(lambda *x, f=f: both(f, *x))(*arguments) for f in (ours, plain))
    for our, their in zip(*map(jax.tree.leaves, found), strict=True):
        assert our.dtype == their.dtype
        our, their = (np.asarray(x, np.float32) for x in (our, their))
        np.testing.assert_allclose(our, their, atol=tolerance * max(1, np.abs(their).max()))


def test_large_logits_overflow_nothing(platform):
    (q, k, v), bias, _ = inputs("float32", scale=100.0)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), jax.jit(plain)(q, k, v), rtol=1e-4, atol=1e-3)
    small, bias = q / 1e4, 300 * bias
    np.testing.assert_allclose(
        jax.jit(ours)(small, k, v, bias), jax.jit(plain)(small, k, v, bias), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("length", [49.9, 50.1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_logits_that_are_called_small_harm_nothing(platform, length, sign):
    """All keys alike, so that every logit is the bound itself, and as far as can be from 0."""
    q, v = jnp.full((1, 4, 3), length / 2), jax.random.normal(jax.random.key(0), (1, 4, 256))
    k = jnp.full((1, 4, 256), float(sign))
    values, pull = jax.vjp(jax.jit(attend), q, k, v)
    np.testing.assert_allclose(values, jnp.broadcast_to(v.mean(-1, keepdims=True), values.shape), rtol=1e-5, atol=1e-6)
    _, _, of_v = pull(jnp.full_like(values, 1e-12))
    np.testing.assert_allclose(of_v, jnp.full_like(v, 3e-12 / 256), rtol=1e-5)


def test_on_tpus_small_logits_save_the_pass_for_their_maximum(monkeypatch):
    taken = []
    branch = jax.lax.cond

    def cond(small, *branches):
        taken.append(bool(small))
        return branch(small, *branches)

    monkeypatch.setattr(attention, "is_for", lambda platform: platform == "tpu")
    monkeypatch.setattr(jax.lax, "cond", cond)
    (q, k, v), bias, _ = inputs("float32")
    ours(q, k, v, bias)
    ours(3 * q, 3 * k, v, bias)
    ours(q, k, v, 20 * bias)
    ours(q.at[0, 0, 0, 0, 0].set(jnp.nan), k, v, bias)
    loud = jnp.ones((1, 3, 2, 1, 1)).at[:, 0, 1].set(20)  # a head whose queries are long, and keys short
    ours(q * loud, k / loud, v, bias)
    assert taken == [True, False, False, False, True]


def test_what_is_traced_knows_whether_it_is_for_tpus(tpus):
    mesh = make_mesh(1, tpus)
    (q, k, v), _, _ = inputs("float32")
    q, k, v = (jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh)) for x in (q, k, v))
    for here, known in ((mesh, True), (make_mesh(), False)):
        with jax.set_mesh(here):
            assert is_for("tpu") == known
            assert is_for("cpu") != known
            assert make_windows((16, 16), 8, shifted=False, offset=None).side_by_side == (2 if known else 1)
    with jax.set_mesh(mesh):
        assert "stablehlo.case" in jax.jit(lambda *x: attend(*x)).lower(q, k, v).as_text()


def test_heads_are_those_of_the_linear_layers():
    qkv, out = (nnx.Linear(6, features, rngs=nnx.Rngs(features)) for features in (18, 6))
    qkv.bias[...] = jax.random.normal(jax.random.key(1), (18,))
    out.bias[...] = jax.random.normal(jax.random.key(2), (6,))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    whole = qkv(x).reshape(2, 5, 3, 2, 3)  # [B, N, parts, heads, d]
    for part, ours in enumerate(split_heads(qkv, x, 3, 2)):
        np.testing.assert_allclose(ours, whole[:, :, part].transpose(0, 2, 3, 1), atol=1e-5)
    heads = x.reshape(2, 5, 2, 3).transpose(0, 2, 3, 1)  # [B, heads, d, N]
    np.testing.assert_allclose(merge_heads(out, heads), out(x), atol=1e-5)
