"""Softmax attention with a hand-written gradient, in layouts that need few copies and no transposes.

Tokens are the last axis, [..., heads, d, N], so the inputs and outputs of every matrix product fill a TPU's lanes. The
forward pass saves less for the backward pass than JAX's own: of the softmax only the exponentials, in the dtype of the
products. The backward pass sums over d where JAX's own sums over keys.

Packed windows (see `packed_windows`): queries of P windows are concatenated along the lanes, [..., heads, d, P * N];
their keys and values are stacked along the channels, [..., heads, P * d, N]. Each query is zero-padded to P * d
channels, so its products with keys of other windows are zero. A matrix unit takes as long for P * d channels as for d,
while they fit, and elementwise operations on pairs fill all lanes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from umae_jax.models.kernels.platforms import tracing_for

# Logits up to this are exponentiated without a shift: e^50 is 5e21, so sums over many keys, and gradients divided by
# them, stay far inside the range of float32 and bfloat16.
MAX_UNSHIFTED_LOGIT = 50.0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tables: jax.Array | None = None,
    pair_bias: Callable[[jax.Array], jax.Array] = lambda tables: tables,
    packed: int = 1,
) -> jax.Array:
    """Compute the same as `attention.attend`.

    Args:
        q, k, v: as in `attention.attend`; for packed windows, Q counts the queries of all, and k and v are stacked.
        tables: float32, the argument of `pair_bias`; None without a bias.
        pair_bias: function from the tables to the bias, broadcastable to [..., heads, K, Q]. It selects one value per
            pair, and may add a negative mask, but not to all pairs of a query.
        packed: number of packed windows; 1 without packing.
    """
    q = q * jnp.asarray(q.shape[-2] ** -0.5, q.dtype)
    if tables is None:
        tables = jnp.zeros((1,) * q.ndim, jnp.float32)
    bias = jnp.broadcast_to(pair_bias(tables), (*q.shape[:-2], k.shape[-1], q.shape[-1]))
    fixed_q, fixed_k, tables = jax.lax.stop_gradient((q, k, tables))
    spread = _spread(fixed_q, packed)
    return _attend(q, k, v, bias, spread, _shift(spread, fixed_k, tables, pair_bias, packed), packed)


def _shift(
    q: jax.Array, k: jax.Array, tables: jax.Array, pair_bias: Callable[[jax.Array], jax.Array], packed: int
) -> jax.Array | None:
    """Return the shift that is subtracted from the logits of each query: float32 [..., heads, 1, Q], or None.

    Softmax is shift-invariant; subtract an upper bound of the logits to stay inside float32. If the shift is None,
    `_forward` subtracts the maximum of its logits. On TPUs, logits are cheaper to recompute than to store: an extra
    pass computes them for their maximum only, and `_forward` computes them again.

    If the norms of queries and keys bound all logits by MAX_UNSHIFTED_LOGIT, the shift is 0 and the extra pass is
    skipped. For packed windows that branch would cost more than the pass. The condition is one scalar, reduced over all
    devices, so all devices take the same branch.
    """

    def max_logits(q: jax.Array) -> jax.Array:
        return _logits(q, k, pair_bias(tables)).max(axis=-2, keepdims=True)

    def max_norm(x: jax.Array) -> jax.Array:  # [..., heads]
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-2).max(axis=-1))

    if not tracing_for("tpu"):
        return None
    if packed > 1:  # without barriers, the compiler stores the logits from their maximum to their exponentials
        return jax.lax.optimization_barrier(max_logits(jax.lax.optimization_barrier(q)))
    return jax.lax.cond(
        jnp.max(max_norm(q) * max_norm(k)) + jnp.max(jnp.abs(tables)) < MAX_UNSHIFTED_LOGIT,
        lambda: jnp.zeros((*q.shape[:-2], 1, q.shape[-1]), jnp.float32),
        lambda: max_logits(q),
    )


def _own_lanes(x: jax.Array, packed: int) -> list[jax.Array]:
    """Return one mask per packed window, bool [Q]: the lanes of [..., d, Q] that hold its queries."""
    lane = jnp.arange(x.shape[-1]) // (x.shape[-1] // packed)
    return [lane == window for window in range(packed)]


def _spread(x: jax.Array, packed: int) -> jax.Array:
    """Zero-pad each query to the channels of all windows: [..., d, Q] -> [..., packed * d, Q]."""
    if packed == 1:
        return x
    zero = jnp.zeros((), x.dtype)
    return jnp.concatenate([jnp.where(own, x, zero) for own in _own_lanes(x, packed)], axis=-2)


def _collect(x: jax.Array, packed: int) -> jax.Array:
    """Select each query's own window, [..., packed * d, Q] -> [..., d, Q]."""
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
    # grad_q is the whole gradient of the queries, including that of their spread copy; the shift has no gradient.
    return grad_q, grad_k, grad_v, grad_logits.astype(wide), None, None


_attend.defvjp(_forward, _backward)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the logits of all pairs, float32 [..., heads, K, Q]."""
    return jnp.einsum("...dk,...dq->...kq", k, q, preferred_element_type=jnp.float32) + bias
