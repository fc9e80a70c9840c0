"""What every transformer here is made of, with the initialisation of SPEC 9.

Precision: parameters are float32; linear layers compute in the model's dtype; layer norms, softmax and the bias of
attention in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

NORM_EPSILON = 1e-6
TOKEN_STD = 0.02
XAVIER_UNIFORM = nnx.initializers.xavier_uniform()


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = XAVIER_UNIFORM,
) -> nnx.Linear:
    """A linear layer with bias 0: [..., inputs] -> [..., outputs]."""
    return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)


def convolution_init(kernel_area: int, outputs: int) -> nnx.Initializer:
    """The initialiser of a convolution written as a linear layer: std sqrt(2 / fan_out), fan_out = area * outputs."""
    return nnx.initializers.normal((2 / (kernel_area * outputs)) ** 0.5)


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm over the last axis, computed and returned in float32."""
    return nnx.LayerNorm(width, epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def token(width: int, *, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """A learned token [1, 1, width]: not a vector, so that weight decay treats it as the reference does."""
    return nnx.Param(TOKEN_STD * jax.random.normal(rngs.params(), (1, 1, width), jnp.float32))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax attention: queries [..., Q, heads, d], keys and values [..., K, heads, d] -> [..., Q, heads * d].

    `bias` [..., heads, Q, K] float32 is added before the softmax, which is computed in float32.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    attended = jnp.einsum("...hqk,...khd->...qhd", weights, v)
    return attended.reshape(*attended.shape[:-2], -1)


def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output of one linear layer, [..., N, 3 * C], as queries, keys and values [..., N, heads, C / heads]."""
    qkv = qkv.reshape(*qkv.shape[:-1], 3, heads, -1)
    return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class TransformerBlock(nnx.Module):
    """A plain pre-norm ViT block with global attention."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1 = layer_norm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.mlp = Mlp(width, mlp_ratio * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, first_query: int = 0) -> jax.Array:
        """[B, N, C] -> [B, N - first_query, C]: only tokens from `first_query` on are updated and returned.

        All tokens serve as keys and values, so the tokens returned are the same whatever `first_query` is.
        """
        q, k, v = split_heads(self.qkv(self.norm1(x)), self.heads)
        x = x[:, first_query:] + self.proj(attend(q[:, first_query:], k, v))
        return x + self.mlp(self.norm2(x))
