"""Softmax attention as one kernel for TPUs, forward and backward: in windows of a map, or among all tokens.

Nothing as large as the pairs of tokens leaves fast memory. The kernel cuts its windows out of maps [B, H, W, C] by
indexing, puts the position bias together from its nine cases, and computes the softmax again in the backward pass.

Inside, keys lie along sublanes and the queries of several heads side by side along lanes. To get there queries are
repeated, each time with the channels of one head and zeros elsewhere: a product of [K, C] and [heads * Q, C] over up to
128 channels costs a matrix unit what one over d channels would, and its result fills the lanes where windows are small.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from umae_jax.models.kernels.platforms import LANES
from umae_jax.models.windows import ACROSS_BORDERS, Windows
from umae_jax.positions import select_by_sign

FAST_MEMORY = 48 * 2**20  # bytes that a kernel may take, of the 64 MiB that a v5p has; others have 128
SUBLANES = 8  # of a vector register of float32, by LANES
WIDE = 256  # lanes that a product's result fills, if windows and heads allow
MAX_TOKENS = 1024  # of a window: some arrays of all pairs of a product lie in fast memory
TOKENS_A_STEP = 1024  # of the images that a step of the kernel's grid takes, about

Ref = Any  # of Pallas: an array in fast memory, of which a step sees its block
Maps = tuple[Any, ...]  # arrays [B, H, W, C], or what stands for them inside the kernel


class Terms(NamedTuple):
    """What is added to queries, keys and values, and before the softmax, as the kernel reads it.

    Attributes:
        biases: float32 [3, C], of the linear layers that make queries, keys and values.
        tables: float32 [products, 9 or 1, K, heads * Q], the position bias of each case, for the heads that share a
            product side by side; None: there is none.
        offsets: float32 [B, windows, 2, heads * N], dy and dx of each token's unit; None where there is one case.
        regions: float32 [windows, 1, heads * N]: tokens of different regions may not see each other; None: all may.
    """

    biases: jax.Array | Ref
    tables: jax.Array | Ref | None
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
        return sum((jnp.where(mask, part, 0) for mask, part in zip(self.masks, parts, strict=True)), jnp.float32(0))


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
        channel = jax.lax.broadcasted_iota(jnp.int32, (1, count * width), 1)
        products = []
        for start in range(0, count, size):
            ends = range(start * width, min(start + size, count) * width, width)
            masks = [(channel >= end) & (channel < end + width) for end in ends]
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
    inputs: Maps,
    biases: Ref,
    outputs: Maps,
    of_biases: Ref | None,
    scratch: tuple[Ref, ...],
    compute: Callable[..., Maps],
) -> None:
    """Compute windows of maps from windows of maps.

    Args:
        form: of the call.
        inputs, outputs: maps [images, H, W, C]; the first inputs are queries, keys and values.
        biases: [3, C], what is added to these.
        of_biases: [3, C], to which the sums of the first outputs are added.
        scratch: one an input and output, float32 [H, W, channels that are read together].
        compute: of image, window, products and the inputs' windows [N, channels], those of the outputs.
    """

    def place(ref: Ref, row: jax.Array, column: int) -> tuple[Any, ...]:
        rows, columns = (size // count for size, count in zip(ref.shape[:2], form.windows, strict=True))
        return pl.ds(row * rows, rows), pl.ds(column * columns, columns)

    rolled, made = scratch[: len(inputs)], scratch[len(inputs) :]
    _, height, width, channels = inputs[0].shape
    queries = height * width // math.prod(form.windows)

    @pl.loop(0, inputs[0].shape[0])
    def of_image(image: jax.Array) -> None:
        for lanes, products in _groups(form.heads, channels, queries):
            here = slice(0, lanes.stop - lanes.start)
            for number, (ref, copy) in enumerate(zip(inputs, rolled, strict=True)):
                x = ref[image, :, :, lanes].astype(jnp.float32)
                if number < biases.shape[0]:
                    x += biases[number : number + 1, lanes][None]
                copy[:, :, here] = _roll(x, form.shift)

            @pl.loop(0, form.windows[0])
            def of_row(row: jax.Array, here: slice = here, products: list[_Product] = products) -> None:
                for column in range(form.windows[1]):
                    windows = [copy[*place(copy, row, column), here].reshape(-1, here.stop) for copy in rolled]
                    computed = compute(image, row * form.windows[1] + column, products, *windows)
                    for copy, x in zip(made, computed, strict=True):
                        at = place(copy, row, column)
                        copy[*at, here] = x.reshape(at[0].size, at[1].size, here.stop)

            for number, (ref, copy) in enumerate(zip(outputs, made, strict=True)):
                x = copy[:, :, here]
                if of_biases is not None:
                    of_biases[number : number + 1, lanes] += x.sum(axis=(0, 1), keepdims=True)[0]
                ref[image, :, :, lanes] = _roll(x, (-form.shift[0], -form.shift[1])).astype(ref.dtype)


def _differences(row: jax.Array, keys: int) -> jax.Array:
    """Of numbers of tokens [1, Q], key minus query: [K, Q]."""
    return _dot(row[:, :keys], jnp.ones_like(row), 0, 0) - row


def _steps(offsets: Ref, image: jax.Array, window: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
    """The difference of dy and of dx of all pairs, float32 [K, heads * Q]."""
    rows = (offsets[image, window, axis : axis + 1] for axis in (0, 1))
    return [_differences(row, shape[0])[:, : shape[1]] for row in rows]


def _add_to_tables(
    of_tables: Ref, terms: Terms, image: jax.Array, window: jax.Array, product: _Product, of_logits: jax.Array
) -> None:
    """Add the gradient of the logits of all pairs to that of the cases that they are of."""
    lanes = of_logits.shape[1]
    if terms.offsets is None:
        of_tables[product.number, 0, :, :lanes] += of_logits
        return
    row, column = _steps(terms.offsets, image, window, of_logits.shape)
    for case in range(9):
        here = (row == case // 3 - 1) & (column == case % 3 - 1)
        of_tables[product.number, case, :, :lanes] += jnp.where(here, of_logits, 0)


def _weights(
    terms: Terms, image: jax.Array, window: jax.Array, product: _Product, k: jax.Array, q: jax.Array
) -> jax.Array:
    """The softmax over keys, float32 [K, heads * Q], of keys [K, C] and spread queries [heads * Q, C]."""
    logits = _dot(k, q, 1, 1)
    keys, lanes = logits.shape
    if terms.tables is not None:
        tables = [terms.tables[product.number, case, :, :lanes] for case in range(terms.tables.shape[1])]
        if terms.offsets is None:
            logits += tables[0]
        else:
            row, column = _steps(terms.offsets, image, window, logits.shape)
            rows = [select_by_sign(column, tables[3 * case : 3 * case + 3]) for case in range(3)]
            logits += select_by_sign(row, rows)
        if terms.regions is not None:
            apart = _differences(terms.regions[window], keys)[:, :lanes]
            logits += jnp.where(apart == 0, 0.0, ACROSS_BORDERS)
    exponentials = jnp.exp(logits - logits.max(axis=0, keepdims=True))
    return exponentials * (1 / exponentials.sum(axis=0, keepdims=True))


def _forward_kernel(form: _Form, maps: Maps, terms: Terms, made: Maps, _of: None, *scratch: Ref) -> None:
    """Queries, keys and values to what is attended to."""
    dtype = maps[0].dtype

    def compute(image: jax.Array, window: jax.Array, products: list[_Product], *windows: jax.Array) -> Maps:
        q, k, v = windows
        k, v = k.astype(dtype), v.astype(dtype)
        attended = jnp.zeros_like(q)
        for product in products:
            weights = _weights(terms, image, window, product, k, product.spread(q * product.scale).astype(dtype))
            attended += product.collect(_dot(weights.astype(dtype), v, 0, 0))
        return (attended,)

    _in_windows(form, maps, terms.biases, made, None, scratch, compute)


def _backward_kernel(
    form: _Form, maps: Maps, terms: Terms, made: Maps, of_terms: tuple[Ref, Ref | None], *scratch: Ref
) -> None:
    """Queries, keys, values and the gradient of what is attended to, to those of the three, of biases and tables."""
    dtype = maps[0].dtype
    of_biases, of_tables = of_terms

    @pl.when(pl.program_id(0) == 0)
    def begin() -> None:
        for of_term in jax.tree.leaves(of_terms):
            of_term[...] = jnp.zeros_like(of_term)

    def compute(image: jax.Array, window: jax.Array, products: list[_Product], *windows: jax.Array) -> Maps:
        q, k, v, gradient = windows
        k, v = k.astype(dtype), v.astype(dtype)
        of_q, of_k, of_v = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
        for product in products:
            queries = product.spread(q * product.scale).astype(dtype)
            spread = product.spread(gradient).astype(dtype)
            weights = _weights(terms, image, window, product, k, queries)
            of_weights = _dot(v, spread, 1, 1)
            of_logits = weights * (of_weights - (weights * of_weights).sum(axis=0, keepdims=True))
            if of_tables is not None:
                _add_to_tables(of_tables, terms, image, window, product, of_logits)
            of_logits = of_logits.astype(dtype)
            of_v += _dot(weights.astype(dtype), spread, 1, 0)
            of_k += _dot(of_logits, queries, 1, 0)
            of_q += product.collect(_dot(of_logits, k, 0, 0)) * product.scale
        return of_q, of_k, of_v

    _in_windows(form, maps, terms.biases, made, of_biases, scratch, compute)


def _call(kernel: Callable[..., None], form: _Form, maps: Maps, terms: Terms, made: Maps, of_terms: Any) -> Any:  # noqa: ANN401
    """Run a kernel over all images, some of them a step.

    Args:
        kernel: one of the two above.
        form: of the call.
        maps: that it reads, the queries first.
        terms: as the kernels read them.
        made: the maps that it writes are like these.
        of_terms: what it writes of all images together is like these, in float32.

    Returns:
        What it writes.
    """
    batch, height, width, channels = maps[0].shape
    most = max(1, TOKENS_A_STEP // (height * width))
    images = max(count for count in range(1, most + 1) if batch % count == 0)
    lanes = min(channels, LANES)

    def some(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((images, *array.shape[1:]), lambda step: (step, *(0,) * (array.ndim - 1)))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda step: (0,) * array.ndim)

    return pl.pallas_call(
        partial(kernel, form),
        jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (made, of_terms)),
        grid=(batch // images,),
        in_specs=(tuple(map(some, maps)), _for_each_term(terms, some, whole)),
        out_specs=(tuple(map(some, made)), jax.tree.map(whole, of_terms)),
        scratch_shapes=[pltpu.VMEM((*array.shape[1:3], lanes), jnp.float32) for array in (*maps, *made)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=FAST_MEMORY),
        cost_estimate=cost(form, maps, terms, made),
        interpret=form.interpret,
        name=kernel.__name__.strip("_"),
    )(maps, terms)


def _for_each_term(terms: Terms, some: Callable[[Any], Any], whole: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    """What holds of terms, by what holds of those that images have, and of those that all share."""
    return jax.tree.map(whole, terms)._replace(offsets=None if terms.offsets is None else some(terms.offsets))


def cost(form: _Form, maps: Maps, terms: Terms, made: Maps) -> pl.CostEstimate:
    """What a call must compute and move at least, forward or backward.

    Bytes are those of memory, where channels lie in whole lanes. Operations are those of the matrix products,
    transcendentals the exponentials: a bound, and a loose one. A product over d channels costs a matrix unit what one
    over 128 would, and each pair takes some ten (forward) to forty (backward, with nine cases) operations of the vector
    unit, which are what the kernel spends its time on.
    """
    (batch, height, width, channels), (_, rows, columns, _) = maps[0].shape, maps[1].shape
    pairs = batch * height * width * rows * columns // math.prod(form.windows)

    def size(array: jax.Array) -> int:
        return math.prod((*array.shape[:-1], -(-array.shape[-1] // LANES) * LANES)) * array.dtype.itemsize

    products = 2 if len(made) == 1 else 5
    return pl.CostEstimate(
        flops=2 * products * pairs * channels,
        transcendentals=pairs * form.heads,
        bytes_accessed=sum(size(array) for array in jax.tree.leaves((maps, terms, made))),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, maps: Maps, terms: Terms) -> jax.Array:
    (attended,), _ = _call(_forward_kernel, form, maps, terms, maps[:1], None)
    return attended


def _forward(form: _Form, maps: Maps, terms: Terms) -> tuple[jax.Array, tuple[Maps, Terms]]:
    return _attend(form, maps, terms), (maps, terms)


def _backward(form: _Form, residuals: tuple[Maps, Terms], gradient: jax.Array) -> tuple[Maps, Terms]:
    maps, terms = residuals
    learned = terms.biases, terms.tables
    of_maps, (of_biases, of_tables) = _call(_backward_kernel, form, (*maps, gradient), terms, maps, learned)
    return of_maps, Terms(of_biases, of_tables, None, None)


_attend.defvjp(_forward, _backward)


def _on_each_device(form: _Form, maps: Maps, terms: Terms) -> jax.Array:
    """Each device attends in its own images: the compiler cannot split a kernel."""
    whole = PartitionSpec()
    images = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    specs = (images,) * 3, _for_each_term(terms, lambda _: images, lambda _: whole)
    attend = jax.shard_map(partial(_attend, form), in_specs=specs, out_specs=images, check_vma=False)
    return attend(maps, terms)


def takes(tokens: int, channels: int, heads: int) -> bool:
    """Whether the kernel takes windows of so many tokens side by side in a row, where it can be used at all.

    That is under a mesh, as a training step is compiled; the few images of pictures and probes take the plain form.
    """
    width = channels // heads
    fills = LANES % width == 0 or channels <= LANES
    return not jax.sharding.get_abstract_mesh().empty and tokens % SUBLANES == 0 and fills


def takes_windows(shape: tuple[int, ...], windows: Windows, heads: int) -> bool:
    """Whether `attend_in_windows` takes maps of a shape [B, H, W, C].

    It takes those that windows tile without padding, all of which cut the mask units at the same places; windows are of
    at most MAX_TOKENS tokens, their rows whole sublanes, unless there is one.
    """
    rows, columns = windows.size
    alone = windows.size == shape[1:3]
    return (
        takes(rows * columns if alone else columns, shape[3], heads)
        and rows * columns <= MAX_TOKENS
        and not any(windows.padding)
        and windows.differences.shape[1] == 1
    )


def takes_all(tokens: int, first_query: int, channels: int, heads: int) -> bool:
    """Whether `attend_to_all` takes so many tokens, of which those from `first_query` on are queries."""
    return tokens <= MAX_TOKENS and all(takes(count, channels, heads) for count in (tokens, tokens - first_query))


def attend_in_windows(
    maps: Maps, biases: jax.Array, windows: Windows, tables: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Softmax attention in windows of maps.

    Args:
        maps: queries, keys and values [B, H, W, heads * d], to which their biases are still to be added.
        biases: float32 [3, heads * d].
        windows: of the maps.
        tables: float32 [9 or 1, heads, N keys, N queries], the bias of each case, in the order of `select_case`.
        interpret: have JAX run the kernels' programs, on any device.

    Returns:
        [B, H, W, heads * d].
    """
    shape = batch, height, width, channels = maps[0].shape
    counts = (height // windows.size[0], width // windows.size[1])
    if counts == (1, 1):  # tokens need not be cut
        maps = tuple(x.reshape(batch, 1, height * width, channels) for x in maps)
    cases, heads, tokens, _ = tables.shape
    together = heads_a_product(heads, channels, tokens)
    products = -(-heads // together)
    tables = jnp.pad(tables, ((0, 0), (0, products * together - heads), (0, 0), (0, 0)))
    tables = tables.reshape(cases, products, together, tokens, tokens).transpose(1, 0, 3, 2, 4)
    offsets, regions = windows.offsets, windows.regions
    terms = Terms(
        biases,
        tables.reshape(products, cases, tokens, together * tokens),
        None if offsets is None else jnp.tile(offsets.astype(jnp.float32), together),
        None if regions is None else jnp.tile(jnp.asarray(regions, jnp.float32), together)[:, None],
    )
    form = _Form(heads, counts, windows.shift, interpret)
    return _on_each_device(form, maps, terms).reshape(shape)


def attend_to_all(maps: Maps, biases: jax.Array, heads: int, *, interpret: bool = False) -> jax.Array:
    """Softmax attention among all tokens.

    Args:
        maps: queries [B, Q, heads * d], keys and values [B, K, heads * d], likewise without their biases.
        biases: float32 [3, heads * d].
        heads: of the channels.
        interpret: have JAX run the kernels' programs, on any device.

    Returns:
        [B, Q, heads * d].
    """
    form = _Form(heads, (1, 1), (0, 0), interpret)
    return _on_each_device(form, tuple(x[:, None] for x in maps), Terms(biases, None, None, None))[:, 0]
