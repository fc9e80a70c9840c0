"""Softmax attention with a hand-written gradient, in layouts that need few copies and no transposes.

Tokens are the last axis, [..., heads, d, N]: the inputs and outputs of every matrix product then fill a TPU's lanes.
The gradient saves and sums less than JAX's own: of the softmax it saves the exponentials in the products' dtype, and it
replaces a sum over keys by a sum over d.

Packed windows (see `packed_windows`): queries of P windows lie side by side in the lanes, [..., heads, d, P * N]. Their
keys and values are stacked, [..., heads, P * d, N]. Queries are spread over as many rows: the rows of their own window,
zeros elsewhere. A product costs a matrix unit the same as long as P * d channels fit in; one window fills only a part.
And each pass over pairs has full lanes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from umae_jax.models.kernels.platforms import is_for

# Logits up to this are exponentiated without a shift: e^50 is 5e21, so sums over many keys, and gradients divided by
# them, stay far inside the range of float32 and bfloat16.
MAX_UNSHIFTED_LOGIT = 50.0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tables: jax.Array | None = None,
    bias_of_pairs: Callable[[jax.Array], jax.Array] = lambda tables: tables,
    packed: int = 1,
) -> jax.Array:
    """Compute `attention.attend`.

    Args:
        q, k, v: as there; with `packed` windows, Q counts the queries of all, and keys and values are stacked.
        tables: float32, the values that the bias is made of; None without a bias.
        bias_of_pairs: from the tables to the bias, broadcastable to [..., heads, K, Q]. It selects one value for each
            pair, and may lower some pairs further, but not all pairs of a query.
        packed: number of windows that lie side by side.
    """
    q = q * jnp.asarray(q.shape[-2] ** -0.5, q.dtype)
    if tables is None:
        tables = jnp.zeros((1,) * q.ndim, jnp.float32)
    bias = jnp.broadcast_to(bias_of_pairs(tables), (*q.shape[:-2], k.shape[-1], q.shape[-1]))
    fixed_q, fixed_k, tables = jax.lax.stop_gradient((q, k, tables))
    spread = _spread(fixed_q, packed)
    return _attend(q, k, v, bias, spread, _shift(spread, fixed_k, tables, bias_of_pairs, packed), packed)


def _shift(
    q: jax.Array, k: jax.Array, tables: jax.Array, bias_of_pairs: Callable[[jax.Array], jax.Array], packed: int
) -> jax.Array | None:
    """Return the shift that is subtracted from the logits of each query: float32 [..., heads, 1, Q], or None.

    Softmax is shift-invariant; subtract an upper bound of the logits to stay inside float32. None asks for the maximum
    of the logits once they are computed. On TPUs, where a product costs less than storing its result, the maximum takes
    one more pass over all pairs, with logits computed twice.

    If the lengths of queries and keys show that all logits are small, the shift is 0 and that pass is saved. Packed
    windows have no such branch: their pass costs less than laying queries and keys out for it. All devices take the
    same branch, by one number that they exchange.
    """

    def max_logits(q: jax.Array) -> jax.Array:
        return _logits(q, k, bias_of_pairs(tables)).max(axis=-2, keepdims=True)

    def max_length(x: jax.Array) -> jax.Array:  # [..., heads]
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-2).max(axis=-1))

    if not is_for("tpu"):
        return None
    if packed > 1:  # barriers keep the compiler from storing logits between their maximum and their exponentials
        return jax.lax.optimization_barrier(max_logits(jax.lax.optimization_barrier(q)))
    return jax.lax.cond(
        jnp.max(max_length(q) * max_length(k)) + jnp.max(jnp.abs(tables)) < MAX_UNSHIFTED_LOGIT,
        lambda: jnp.zeros((*q.shape[:-2], 1, q.shape[-1]), jnp.float32),
        lambda: max_logits(q),
    )


def _own_lanes(x: jax.Array, packed: int) -> list[jax.Array]:
    """Return for each window which lanes of [..., d, Q] are its own: bool [Q]."""
    lane = jnp.arange(x.shape[-1]) // (x.shape[-1] // packed)
    return [lane == window for window in range(packed)]


def _spread(x: jax.Array, packed: int) -> jax.Array:
    """[..., d, Q] -> [..., packed * d, Q]: each window's own lanes, zeros elsewhere."""
    if packed == 1:
        return x
    zero = jnp.zeros((), x.dtype)
    return jnp.concatenate([jnp.where(own, x, zero) for own in _own_lanes(x, packed)], axis=-2)


def _collect(x: jax.Array, packed: int) -> jax.Array:
    """[..., packed * d, Q] -> [..., d, Q]: each window's own lanes."""
    first, *others = jnp.split(x, packed, axis=-2)
    for own, other in zip(_own_lanes(x, packed)[1:], others, strict=True):
        first = jnp.where(own, other, first)
    return first


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, spread: jax.Array, shift: jax.Array | None, packed: int
) -> jax.Array:
    return _forward(q, k, v, bias, spread, shift, packed)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, spread: jax.Array, shift: jax.Array | None, packed: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits = _logits(spread, k, bias)
    exponentials = jnp.exp(logits - (logits.max(axis=-2, keepdims=True) if shift is None else shift))
    scale = 1 / exponentials.sum(axis=-2, keepdims=True)  # [..., heads, 1, Q]
    exponentials = exponentials.astype(v.dtype)
    attended = jnp.einsum("...dk,...kq->...dq", v, exponentials, preferred_element_type=jnp.float32)
    attended = (_collect(attended, packed) * scale).astype(v.dtype)
    return attended, (q, k, v, exponentials, scale, attended)


def _backward(packed: int, residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, exponentials, scale, attended = residuals
    wide = jnp.float32
    gradient = (gradient.astype(wide) * scale).astype(v.dtype)
    # The softmax gradient's weighted mean over keys, sum_k w_k dw_k, equals the sum over d of o_d do_d.
    mean = jnp.sum(attended.astype(wide) * gradient.astype(wide), axis=-2, keepdims=True)  # [..., heads, 1, Q]
    gradient = _spread(gradient, packed)
    grad_v = jnp.einsum("...dq,...kq->...dk", gradient, exponentials)
    grad_weights = jnp.einsum("...dk,...dq->...kq", v, gradient, preferred_element_type=wide)
    grad_logits = (exponentials.astype(wide) * (grad_weights - mean)).astype(v.dtype)
    grad_q = _collect(jnp.einsum("...dk,...kq->...dq", k, grad_logits), packed)
    grad_k = jnp.einsum("...dq,...kq->...dk", _spread(q, packed), grad_logits)
    # grad_q already holds the whole gradient of the queries, their spread copy included; the shift has none.
    return grad_q, grad_k, grad_v, grad_logits.astype(wide), None, None


_attend.defvjp(_forward, _backward)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the logits of all pairs, float32 [..., heads, K, Q]."""
    return jnp.einsum("...dk,...dq->...kq", k, q, preferred_element_type=jnp.float32) + bias
