"""The plain form of attention against linear layers and pairs written out."""

import jax
import numpy as np
from flax import nnx

from umae_jax.models.attention import attend, merge_heads, split_heads


def test_attention_is_the_softmax_over_keys_written_out():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 3, 8, tokens)) for key, tokens in zip(keys, (5, 7, 7), strict=False))
    bias = jax.random.normal(keys[3], (1, 3, 7, 5))
    attended = np.asarray(attend(q, k, v, bias))
    for image, head, query in np.ndindex(2, 3, 5):
        weights = np.exp(k[image, head].T @ q[image, head, :, query] / 8**0.5 + bias[0, head, :, query])
        expected = v[image, head] @ (weights / weights.sum())
        np.testing.assert_allclose(attended[image, head, :, query], expected, rtol=1e-4, atol=1e-5)


def test_heads_are_parts_of_the_linear_layers():
    qkv, out = (nnx.Linear(6, features, rngs=nnx.Rngs(features)) for features in (18, 6))
    qkv.bias[...] = jax.random.normal(jax.random.key(1), (18,))
    out.bias[...] = jax.random.normal(jax.random.key(2), (6,))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    whole = qkv(x).reshape(2, 5, 3, 2, 3)  # [B, N, parts, heads, d]
    for part, ours in enumerate(split_heads(qkv, x, 3, 2)):
        np.testing.assert_allclose(ours, whole[:, :, part].transpose(0, 2, 3, 1), atol=1e-5)
    heads = x.reshape(2, 5, 2, 3).transpose(0, 2, 3, 1)  # [B, heads, d, N]
    np.testing.assert_allclose(merge_heads(out, heads), out(x), atol=1e-5)
