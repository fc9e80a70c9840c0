"""Attention, laid out and differentiated by hand, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.models.attention import attend, merge_heads, split_heads


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_plain_form(dtype, tolerance, biased):
    (q, k, v), bias, gradient = inputs(dtype)
    arguments = (q, k, v, bias) if biased else (q, k, v)

    def both(function, *arguments):
        values, pull = jax.vjp(function, *arguments)
        return values, pull(gradient)

    ours, theirs = (jax.jit(lambda *x, f=f: both(f, *x))(*arguments) for f in (attend, plain))
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert our.dtype == their.dtype
        our, their = (np.asarray(x, np.float32) for x in (our, their))
        np.testing.assert_allclose(our, their, atol=tolerance * max(1, np.abs(their).max()))


def test_large_logits_overflow_nothing():
    (q, k, v), _, _ = inputs("float32", scale=100.0)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), jax.jit(plain)(q, k, v), rtol=1e-4, atol=1e-3)


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
