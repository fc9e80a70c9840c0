"""Softmax attention, laid out and differentiated so that the compiler moves as little as it can.

Tokens are the last axis throughout, [..., heads, d, N]: matrix products then give and take arrays whose last axis fills
the lanes of a TPU, and none is transposed. The backward pass is written out, because it needs less than JAX would
save and sum: of the softmax, its exponentials in the products' dtype; of the gradient's sum over keys, one over d.

Windows of fewer tokens than a TPU has lanes are attended to several at a time, their queries side by side in the
lanes: [..., heads, d, several * N]. Keys and values of these windows lie one below the other, [..., heads,
several * d, N], and meet the queries spread over as many rows, each window's in its own and zeros elsewhere. The
products cost a matrix unit what they did, as long as the channels of all windows fit in, of which one fills a quarter;
and each pass over pairs has full lanes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from umae_jax.models.kernels.platforms import is_for

# Logits up to this may be exponentiated as they are: e^50 is 5e21, and sums of it over many keys, and gradients divided
# by these, stay far inside the range of float32 and bfloat16.
SMALL = 50.0


def split_heads(
    linear: nnx.Linear, x: jax.Array, parts: int, heads: int, *, side_by_side: int = 1, first_query: int = 0
) -> tuple[jax.Array, ...]:
    """A linear layer whose output is so many arrays: [..., N, C] -> parts of [..., heads, d, N].

    One product a part: each is written where attention reads it, which one product for all would not be. The first
    part is only of tokens from `first_query` on, for queries that are not all needed.

    With several windows `side_by_side`, [..., windows, N, C] -> [..., windows / several, heads, d, several * N] of the
    first part, then the queries, and [..., windows / several, heads, several * d, N] of the others.
    """
    kernel = linear.kernel[...].reshape(x.shape[-1], parts, heads, -1).astype(linear.dtype)
    bias = _bias(linear).reshape(parts, *(1,) * (x.ndim - 2), heads, -1, 1)
    x = x.astype(linear.dtype)
    if side_by_side == 1:
        read = [x[..., first_query:, :], *(parts - 1) * [x]]
        return tuple(jnp.einsum("...nc,chd->...hdn", x, kernel[:, part]) + bias[part] for part, x in enumerate(read))
    assert first_query == 0
    x = x.reshape(*x.shape[:-3], -1, side_by_side, *x.shape[-2:])  # [..., windows / several, several, N, C]
    queries = jnp.einsum("...nc,chd->...hdn", x.reshape(*x.shape[:-3], -1, x.shape[-1]), kernel[:, 0]) + bias[0]
    split = [queries]
    for part in range(1, parts):
        stacked = jnp.einsum("...snc,chd->...hsdn", x, kernel[:, part]) + bias[part][..., None, :, :]
        split.append(stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1]))
    return tuple(split)


def split_channels(linear: nnx.Linear, x: jax.Array, parts: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The same with channels last: [..., C] -> parts of [..., heads * d] without their biases, and these apart.

    The biases are float32 [parts, heads * d].
    """
    kernels = jnp.split(linear.kernel[...].astype(linear.dtype), parts, axis=-1)
    x = x.astype(linear.dtype)
    biases = cast(nnx.Param[jax.Array], linear.bias)[...].reshape(parts, -1)
    return tuple(jnp.einsum("...c,cd->...d", x, kernel) for kernel in kernels), biases


def merge_heads(linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """A linear layer over the heads together: [..., heads, d, N] -> [..., N, C]."""
    kernel = linear.kernel[...].reshape(*x.shape[-3:-1], -1).astype(linear.dtype)
    bias = _bias(linear).reshape(*(1,) * (x.ndim - 2), -1)
    return jnp.einsum("...hdn,hdc->...nc", x.astype(linear.dtype), kernel) + bias


def _bias(linear: nnx.Linear) -> jax.Array:
    return cast(nnx.Param[jax.Array], linear.bias)[...].astype(linear.dtype)  # all layers here have one


class Bias(NamedTuple):
    """What is added to logits before the softmax.

    Attributes:
        tables: float32, the numbers that it is made of.
        of_pairs: from these to the bias of each pair, which broadcasts to [..., heads, K, Q]. It chooses one of the
            numbers for each, and may lower some pairs further, but not all of a query.
    """

    tables: jax.Array
    of_pairs: Callable[[jax.Array], jax.Array] = lambda tables: tables

    def __call__(self) -> jax.Array:
        """The bias of each pair."""
        return self.of_pairs(self.tables)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None = None, side_by_side: int = 1) -> jax.Array:
    """Softmax attention: queries [..., heads, d, Q], keys and values [..., heads, d, K] -> [..., heads, d, Q].

    The softmax is computed in float32.

    With several windows `side_by_side`, Q counts the queries of all of them, and keys and values are
    [..., heads, several * d, K].
    """
    q = q * jnp.asarray(q.shape[-2] ** -0.5, q.dtype)
    if bias is None:
        bias = Bias(jnp.zeros((1,) * q.ndim, jnp.float32))
    of_pairs = jnp.broadcast_to(bias(), (*q.shape[:-2], k.shape[-1], q.shape[-1]))
    q_fixed, k_fixed, tables = jax.lax.stop_gradient((q, k, bias.tables))
    spread = _spread(q_fixed, side_by_side)
    shift = _shift(spread, k_fixed, Bias(tables, bias.of_pairs), side_by_side)
    return _attend(q, k, v, of_pairs, spread, shift, side_by_side)


def _shift(q: jax.Array, k: jax.Array, bias: Bias, several: int) -> jax.Array | None:
    """What is subtracted from the logits of each query before the exponentials: float32 [..., heads, 1, Q].

    A softmax is the same whatever that is; it only has to keep exponentials and their sums inside float32. The largest
    logit does; None asks for it to be taken of logits once they are there. On TPUs, where a product costs less than to
    store its result, that means to go through all pairs once more and to compute logits twice.

    Where the lengths of queries and keys tell that all logits are small, nothing is subtracted and that pass saved;
    but not for windows side by side, whose pass costs less than to lay queries and keys out for a branch. All devices
    decide together, by one number that they exchange.
    """

    def largest(q: jax.Array) -> jax.Array:
        return _logits(q, k, bias()).max(axis=-2, keepdims=True)

    def longest(x: jax.Array) -> jax.Array:  # [..., heads]
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-2).max(axis=-1))

    if not is_for("tpu"):
        return None
    if several > 1:  # barriers keep the compiler from storing logits between their maximum and their exponentials
        return jax.lax.optimization_barrier(largest(jax.lax.optimization_barrier(q)))
    return jax.lax.cond(
        jnp.max(longest(q) * longest(k)) + jnp.max(jnp.abs(bias.tables)) < SMALL,
        lambda: jnp.zeros((*q.shape[:-2], 1, q.shape[-1]), jnp.float32),
        lambda: largest(q),
    )


def _own_lanes(x: jax.Array, several: int) -> list[jax.Array]:
    """For each window, bool [Q]: which lanes of [..., d, Q] are its own."""
    lane = jnp.arange(x.shape[-1]) // (x.shape[-1] // several)
    return [lane == window for window in range(several)]


def _spread(x: jax.Array, several: int) -> jax.Array:
    """[..., d, Q] -> [..., several * d, Q], of each window its own lanes and zeros."""
    if several == 1:
        return x
    zero = jnp.zeros((), x.dtype)
    return jnp.concatenate([jnp.where(own, x, zero) for own in _own_lanes(x, several)], axis=-2)


def _collect(x: jax.Array, several: int) -> jax.Array:
    """[..., several * d, Q] -> [..., d, Q], of each window its own lanes."""
    first, *others = jnp.split(x, several, axis=-2)
    for own, other in zip(_own_lanes(x, several)[1:], others, strict=True):
        first = jnp.where(own, other, first)
    return first


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, spread: jax.Array, shift: jax.Array | None, several: int
) -> jax.Array:
    return _forward(q, k, v, bias, spread, shift, several)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, spread: jax.Array, shift: jax.Array | None, several: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits = _logits(spread, k, bias)
    exponentials = jnp.exp(logits - (logits.max(axis=-2, keepdims=True) if shift is None else shift))
    scale = 1 / exponentials.sum(axis=-2, keepdims=True)  # [..., heads, 1, Q]
    exponentials = exponentials.astype(v.dtype)
    attended = jnp.einsum("...dk,...kq->...dq", v, exponentials, preferred_element_type=jnp.float32)
    attended = (_collect(attended, several) * scale).astype(v.dtype)
    return attended, (q, k, v, exponentials, scale, attended)


def _backward(several: int, residuals: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, exponentials, scale, attended = residuals
    wide = jnp.float32
    gradient = (gradient.astype(wide) * scale).astype(v.dtype)
    # What a query's weights sum to in the gradient of a softmax, sum_k w_k dw_k, is also the sum over d of o_d do_d.
    mean = jnp.sum(attended.astype(wide) * gradient.astype(wide), axis=-2, keepdims=True)  # [..., heads, 1, Q]
    gradient = _spread(gradient, several)
    of_v = jnp.einsum("...dq,...kq->...dk", gradient, exponentials)
    of_weights = jnp.einsum("...dk,...dq->...kq", v, gradient, preferred_element_type=wide)
    of_logits = (exponentials.astype(wide) * (of_weights - mean)).astype(v.dtype)
    of_q = _collect(jnp.einsum("...dk,...kq->...dq", k, of_logits), several)
    of_k = jnp.einsum("...dq,...kq->...dk", _spread(q, several), of_logits)
    return of_q, of_k, of_v, of_logits.astype(wide), None, None  # all of the queries' is in theirs; a shift has none


_attend.defvjp(_forward, _backward)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """float32 [..., heads, K, Q]."""
    return jnp.einsum("...dk,...dq->...kq", k, q, preferred_element_type=jnp.float32) + bias
