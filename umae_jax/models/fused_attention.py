"""Softmax attention as one kernel for TPUs, forward and backward: in windows of a map, or among all tokens.

Nothing as large as the pairs of tokens leaves fast memory. The kernel cuts its windows out of maps [B, H, W, C] by
indexing, puts the position bias together from its nine cases, and computes the softmax again in the backward pass.

Inside, keys lie along sublanes and the queries of several heads side by side along lanes. To get there queries are
repeated, each time with the channels of one head and zeros elsewhere: a product of [K, C] and [heads * Q, C] over up to
128 channels costs a matrix unit what one over d channels would, and its result fills the lanes where windows are small.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from umae_jax.models.windows import ACROSS_BORDERS

LANES, SUBLANES = 128, 8  # of a vector register of float32
WIDE = 256  # lanes that a product's result fills, if windows and heads allow
TOKENS_A_STEP = 1024  # of the images that a step of the kernel's grid takes, about

Ref = Any  # of Pallas: an array in fast memory, of which a step sees its block


class Bias(NamedTuple):
    """What is added before the softmax, in the form that the kernel reads; `queries` are those of a product's heads.

    Attributes:
        tables: float32 [products, 9 or 1, K, heads * Q], the bias of each case.
        offsets: float32 [B, windows, 2, heads * N], dy and dx of each token's unit; None where there is one case.
        regions: float32 [windows, 1, heads * N]: tokens of different regions may not see each other; None: all may.
    """

    tables: jax.Array | Ref
    offsets: jax.Array | Ref | None
    regions: jax.Array | Ref | None


@dataclass(frozen=True)
class _Form:
    """What is static of a call.

    Attributes:
        heads: of the channels.
        windows: how many there are along rows and columns of a map.
        shift: rows and columns by which maps are rolled towards the origin before they are cut.
        interpret: have JAX run the kernel's program step by step, on any device.
    """

    heads: int
    windows: tuple[int, int]
    shift: tuple[int, int]
    interpret: bool


class _Product(NamedTuple):
    """Heads that share products.

    Attributes:
        number: of all products of a map.
        masks: for each head, bool [1, channels], which of the channels that are read are its own.
        scale: of its queries.
    """

    number: int
    masks: list[jax.Array]
    scale: float

    def spread(self, x: jax.Array) -> jax.Array:
        """[N, channels] -> [heads * N, channels], of each head its own channels and zeros."""
        return jnp.concatenate([jnp.where(mask, x, 0) for mask in self.masks])

    def collect(self, x: jax.Array) -> jax.Array:
        """[heads * N, channels] -> [N, channels], of each head its own channels."""
        parts = jnp.split(x, len(self.masks))
        return sum(jnp.where(mask, part, 0) for mask, part in zip(self.masks, parts, strict=True))


def heads_a_product(heads: int, channels: int, queries: int) -> int:
    """How many heads share products: a divisor of those that are read together, which fill the lanes."""
    group = min(heads, LANES * heads // channels)
    return max(size for size in range(1, group + 1) if group % size == 0 and (size == 1 or size * queries <= WIDE))


def _groups(heads: int, channels: int, queries: int) -> Iterator[tuple[slice, list[_Product]]]:
    """The channels that are read together, and the products that their heads are computed in."""
    width, size = channels // heads, heads_a_product(heads, channels, queries)
    group = min(heads, LANES // width)
    for first in range(0, heads, group):
        count = min(group, heads - first)
        owner = jax.lax.broadcasted_iota(jnp.int32, (1, count * width), 1) // width
        products = []
        for start in range(0, count, size):
            masks = [owner == head for head in range(start, min(start + size, count))]
            products.append(_Product((first + start) // size, masks, width**-0.5))
        yield slice(first * width, (first + count) * width), products


def _dot(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    """A matrix product over one axis of each, float32."""
    return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _roll(x: jax.Array, shift: tuple[int, int]) -> jax.Array:
    """Roll a map [H, W, C] towards its origin."""
    rows, columns = (distance % size for distance, size in zip(shift, x.shape[:2], strict=True))
    if rows:
        x = jnp.concatenate([x[rows:], x[:rows]])
    return pltpu.roll(x, x.shape[1] - columns, 1) if columns else x


def _in_windows(
    form: _Form,
    inputs: tuple[Ref, ...],
    outputs: tuple[Ref, ...],
    scratch: tuple[Ref, ...],
    compute: Callable[..., tuple[jax.Array, ...]],
) -> None:
    """Compute windows of maps from windows of maps.

    Args:
        form: of the call.
        inputs, outputs: maps [images, H, W, C]; the first input is the queries'.
        scratch: one an input and output, float32 [H, W, channels that are read together].
        compute: of image, window, products and the inputs' windows [N, channels], those of the outputs.
    """

    def place(ref: Ref, row: jax.Array, column: int) -> tuple[Any, ...]:
        rows, columns = (size // count for size, count in zip(ref.shape[:2], form.windows, strict=True))
        return pl.ds(row * rows, rows), pl.ds(column * columns, columns)

    rolled, made = scratch[: len(inputs)], scratch[len(inputs) :]
    _, height, width, channels = inputs[0].shape
    queries = height * width // (form.windows[0] * form.windows[1])

    @pl.loop(0, inputs[0].shape[0])
    def _(image: jax.Array) -> None:
        for lanes, products in _groups(form.heads, channels, queries):
            here = slice(0, lanes.stop - lanes.start)
            for ref, copy in zip(inputs, rolled, strict=True):
                copy[:, :, here] = _roll(ref[image, :, :, lanes].astype(jnp.float32), form.shift)

            @pl.loop(0, form.windows[0])
            def _(row: jax.Array, here: slice = here, products: list[_Product] = products) -> None:
                for column in range(form.windows[1]):
                    windows = [copy[*place(copy, row, column), here].reshape(-1, here.stop) for copy in rolled]
                    computed = compute(image, row * form.windows[1] + column, products, *windows)
                    for copy, x in zip(made, computed, strict=True):
                        at = place(copy, row, column)
                        copy[*at, here] = x.reshape(at[0].size, at[1].size, here.stop)

            for ref, copy in zip(outputs, made, strict=True):
                back = _roll(copy[:, :, here], (-form.shift[0], -form.shift[1]))
                ref[image, :, :, lanes] = back.astype(ref.dtype)


def _differences(row: jax.Array, keys: int) -> jax.Array:
    """Of numbers of tokens [1, Q], key minus query: [K, Q]."""
    return _dot(row[:, :keys], jnp.ones_like(row), 0, 0) - row


def _steps(bias: Bias, image: jax.Array, window: jax.Array) -> list[jax.Array]:
    """The difference of dy and of dx of all pairs, float32 [K, heads * Q]."""
    keys = bias.tables.shape[2]
    return [_differences(bias.offsets[image, window, axis : axis + 1], keys) for axis in (0, 1)]


def _choose(step: jax.Array, cases: list[jax.Array]) -> jax.Array:
    return jnp.where(step < 0, cases[0], jnp.where(step > 0, cases[2], cases[1]))


def _weights(
    bias: Bias | None, image: jax.Array, window: jax.Array, product: _Product, k: jax.Array, q: jax.Array
) -> jax.Array:
    """The softmax over keys, float32 [K, heads * Q], of keys [K, C] and spread queries [heads * Q, C]."""
    logits = _dot(k, q, 1, 1)
    keys, lanes = logits.shape
    if bias is not None:
        tables = [bias.tables[product.number, case, :, :lanes] for case in range(bias.tables.shape[1])]
        if bias.offsets is None:
            logits += tables[0]
        else:
            row, column = (step[:, :lanes] for step in _steps(bias, image, window))
            logits += _choose(row, [_choose(column, tables[3 * case : 3 * case + 3]) for case in range(3)])
        if bias.regions is not None:
            apart = _differences(bias.regions[window], keys)[:, :lanes]
            logits += jnp.where(apart == 0, 0.0, ACROSS_BORDERS)
    exponentials = jnp.exp(logits - logits.max(axis=0, keepdims=True))
    return exponentials * (1 / exponentials.sum(axis=0, keepdims=True))


def _forward_kernel(form: _Form, q: Ref, k: Ref, v: Ref, bias: Bias | None, attended: Ref, *scratch: Ref) -> None:
    dtype = q.dtype

    def compute(
        image: jax.Array, window: jax.Array, products: list[_Product], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        k, v = k.astype(dtype), v.astype(dtype)
        attended = jnp.zeros_like(q)
        for product in products:
            weights = _weights(bias, image, window, product, k, product.spread(q * product.scale).astype(dtype))
            attended += product.collect(_dot(weights.astype(dtype), v, 0, 0))
        return (attended,)

    _in_windows(form, (q, k, v), (attended,), scratch, compute)


def _backward_kernel(
    form: _Form,
    q: Ref,
    k: Ref,
    v: Ref,
    bias: Bias | None,
    gradient: Ref,
    of_q: Ref,
    of_k: Ref,
    of_v: Ref,
    of_tables: Ref | None,
    *scratch: Ref,
) -> None:
    dtype = q.dtype
    if of_tables is not None:

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            of_tables[...] = jnp.zeros_like(of_tables)

    def add_to_tables(image: jax.Array, window: jax.Array, product: _Product, of_logits: jax.Array) -> None:
        keys, lanes = of_logits.shape
        if bias.offsets is None:
            of_tables[product.number, 0, :, :lanes] += of_logits
            return
        row, column = (step[:, :lanes] for step in _steps(bias, image, window))
        for case in range(9):
            here = (row == case // 3 - 1) & (column == case % 3 - 1)
            of_tables[product.number, case, :, :lanes] += jnp.where(here, of_logits, 0)

    def compute(
        image: jax.Array, window: jax.Array, products: list[_Product], *windows: jax.Array
    ) -> tuple[jax.Array, ...]:
        q, k, v, gradient = windows
        k, v = k.astype(dtype), v.astype(dtype)
        of_q, of_k, of_v = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
        for product in products:
            queries = product.spread(q * product.scale).astype(dtype)
            spread = product.spread(gradient).astype(dtype)
            weights = _weights(bias, image, window, product, k, queries)
            of_weights = _dot(v, spread, 1, 1)
            of_logits = weights * (of_weights - (weights * of_weights).sum(axis=0, keepdims=True))
            if of_tables is not None:
                add_to_tables(image, window, product, of_logits)
            of_logits = of_logits.astype(dtype)
            of_v += _dot(weights.astype(dtype), spread, 1, 0)
            of_k += _dot(of_logits, queries, 1, 0)
            of_q += product.collect(_dot(of_logits, k, 0, 0)) * product.scale
        return of_q, of_k, of_v

    _in_windows(form, (q, k, v, gradient), (of_q, of_k, of_v), scratch, compute)


def _images_a_step(maps: jax.Array) -> int:
    batch, height, width, _ = maps.shape
    most = max(1, TOKENS_A_STEP // (height * width))
    return max(count for count in range(1, most + 1) if batch % count == 0)


def _call(
    kernel: Callable[..., None],
    form: _Form,
    maps: tuple[jax.Array, ...],
    bias: Bias | None,
    more: tuple[jax.Array, ...],
    outputs: tuple[Any, ...],
    of_tables: bool,
) -> Any:  # noqa: ANN401
    """Run a kernel over all images, so many at a step."""
    images = _images_a_step(maps[0])
    channels = maps[0].shape[-1]
    lanes = max(lanes.stop - lanes.start for lanes, _ in _groups(form.heads, channels, 1))

    def some(array: Any) -> pl.BlockSpec:  # noqa: ANN401
        return pl.BlockSpec((images, *array.shape[1:]), lambda step: (step, *(0,) * (array.ndim - 1)))

    def whole(array: Any) -> pl.BlockSpec:  # noqa: ANN401
        return pl.BlockSpec(array.shape, lambda step: (0,) * array.ndim)

    specs_of_bias = None
    if bias is not None:
        specs_of_bias = Bias(
            whole(bias.tables),
            None if bias.offsets is None else some(bias.offsets),
            None if bias.regions is None else whole(bias.regions),
        )
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs]
    specs = [some(array) for array in outputs]
    if of_tables:
        shapes.append(jax.ShapeDtypeStruct(bias.tables.shape, jnp.float32))
        specs.append(whole(bias.tables))
    return pl.pallas_call(
        partial(kernel, form),
        tuple(shapes),
        grid=(maps[0].shape[0] // images,),
        in_specs=(*map(some, maps), specs_of_bias, *map(some, more)),
        out_specs=tuple(specs),
        scratch_shapes=[pltpu.VMEM((*x.shape[1:3], lanes), jnp.float32) for x in (*maps, *more, *outputs)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=form.interpret,
    )(*maps, bias, *more)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None) -> jax.Array:
    return _call(_forward_kernel, form, (q, k, v), bias, (), (q,), False)[0]


def _forward(form, q, k, v, bias):
    return _attend(form, q, k, v, bias), (q, k, v, bias)


def _backward(form, residuals, gradient):
    q, k, v, bias = residuals
    kernel = _backward_kernel if bias is not None else _backward_kernel_none
    made = _call(kernel, form, (q, k, v), bias, (gradient,), (q, k, v), bias is not None)
    return *made[:3], None if bias is None else Bias(made[3], None, None)


def _backward_kernel_none(form, q, k, v, bias, gradient, of_q, of_k, of_v, *scratch):
    _backward_kernel(form, q, k, v, bias, gradient, of_q, of_k, of_v, None, *scratch)


_attend.defvjp(_forward, _backward)
