"""Softmax attention as Pallas kernels for TPUs, forward and backward: within windows of a map, or among all tokens.

Arrays of all pairs of tokens stay in VMEM. A kernel slices its windows from maps [B, H, W, C], selects the position
bias from its nine cases, and recomputes the softmax in the backward pass.

Keys lie along sublanes, and the queries of several heads along lanes. Queries are repeated for each head, with zeros in
the channels of the other heads. The MXU takes as long for a product of [K, C] and [heads * Q, C] over up to 128
channels as for one over d channels, and the result fills the lanes even for small windows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from umae_jax.models.kernels.platforms import LANES
from umae_jax.models.windows import MASK_VALUE, Windows
from umae_jax.positions import select_by_sign

VMEM_BYTES = 48 * 2**20  # VMEM limit of a kernel; a v5p has 64 MiB, other chips 128
SUBLANES = 8  # rows of a float32 vector register, [SUBLANES, LANES]
MAX_LANES = 256  # max lanes of the result of one product
MAX_TOKENS = 1024  # max tokens of a window: arrays of all its pairs must fit in VMEM
TOKENS_PER_STEP = 1024  # approximate number of tokens per step of the kernel's grid

Ref = Any  # Pallas: one grid step's block of an array, in VMEM
Maps = tuple[Any, ...]  # arrays [B, H, W, C], or Refs to them inside the kernel


class Terms(NamedTuple):
    """The terms added to queries, keys and values, and to the logits, in the kernel's layout; all float32."""

    biases: jax.Array | Ref  # [3, C], of the linear layers of queries, keys and values
    # [products, 9 or 1, K, heads * Q], the position bias of each case, with the heads of a product together
    tables: jax.Array | Ref | None = None
    offsets: jax.Array | Ref | None = None  # [B, windows, 2, heads * N], (dy, dx) of each token's unit
    # [windows, 1, heads * N]; tokens of different regions do not attend to each other
    regions: jax.Array | Ref | None = None


@dataclass(frozen=True)
class _Settings:
    """Static settings of a call."""

    heads: int
    windows: tuple[int, int]  # along the rows and columns of a map
    shift: tuple[int, int]  # rows and columns by which maps are rolled towards the origin before they are cut
    interpret: bool  # use Pallas's interpret mode, which runs on any device


class _Product(NamedTuple):
    """A group of heads computed in one matrix product."""

    number: int  # index among the products of a map
    masks: list[jax.Array]  # for each head, bool [1, channels]: its own channels among those read
    scale: float  # of the queries

    def spread(self, x: jax.Array) -> jax.Array:
        """Repeat tokens for each head, [N, channels] -> [heads * N, channels], with zeros in other heads' channels."""
        return jnp.concatenate([jnp.where(mask, x, 0) for mask in self.masks])

    def collect(self, x: jax.Array) -> jax.Array:
        """Keep each head's own channels, [heads * N, channels] -> [N, channels]."""
        parts = jnp.split(x, len(self.masks))
        return sum((jnp.where(mask, part, 0) for mask, part in zip(self.masks, parts, strict=True)), jnp.float32(0))


def _heads_per_product(heads: int, channels: int, queries: int) -> int:
    """Return the number of heads per product, a divisor of the number of heads whose channels are read together."""
    group = min(heads, LANES * heads // channels)
    return max(size for size in range(1, group + 1) if group % size == 0 and (size == 1 or size * queries <= MAX_LANES))


def _groups(heads: int, channels: int, queries: int) -> Iterator[tuple[slice, list[_Product]]]:
    """Yield groups of heads: the channels to read, and the products to compute from them."""
    width, size = channels // heads, _heads_per_product(heads, channels, queries)
    group = min(heads, LANES // width)
    for first in range(0, heads, group):
        count = min(group, heads - first)
        channel = jax.lax.broadcasted_iota(jnp.int32, (1, count * width), 1)
        products = []
        for start in range(0, count, size):
            head_starts = range(start * width, min(start + size, count) * width, width)
            masks = [(channel >= first_channel) & (channel < first_channel + width) for first_channel in head_starts]
            products.append(_Product((first + start) // size, masks, width**-0.5))
        yield slice(first * width, (first + count) * width), products


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiply matrices over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _roll(x: jax.Array, shift: tuple[int, int]) -> jax.Array:
    """Roll a map [H, W, C] towards its origin."""
    rows, columns = (distance % size for distance, size in zip(shift, x.shape[:2], strict=True))
    if rows:
        x = jnp.concatenate([x[rows:], x[:rows]])
    return pltpu.roll(x, x.shape[1] - columns, 1) if columns else x


def _apply_to_windows(
    settings: _Settings,
    inputs: Maps,
    biases: Ref,
    outputs: Maps,
    grad_biases: Ref | None,
    scratch: tuple[Ref, ...],
    compute: Callable[..., Maps],
) -> None:
    """Apply a function to each window of maps [images, H, W, C].

    Args:
        biases: [3, C], added to the first three inputs: queries, keys and values.
        grad_biases: [3, C], accumulates the outputs summed over all tokens; None: no sums.
        scratch: per input and output, float32 [H, W, channels of a group of heads].
        compute: image, window, products, windows of the inputs [N, channels] -> windows of the outputs.
    """

    def slices(ref: Ref, row: jax.Array, column: int) -> tuple[Any, ...]:
        rows, columns = (size // count for size, count in zip(ref.shape[:2], settings.windows, strict=True))
        return pl.ds(row * rows, rows), pl.ds(column * columns, columns)

    rolled, results = scratch[: len(inputs)], scratch[len(inputs) :]
    _, height, width, channels = inputs[0].shape
    queries = height * width // math.prod(settings.windows)

    @pl.loop(0, inputs[0].shape[0])
    def per_image(image: jax.Array) -> None:
        for lanes, products in _groups(settings.heads, channels, queries):
            local = slice(0, lanes.stop - lanes.start)
            for number, (ref, copy) in enumerate(zip(inputs, rolled, strict=True)):
                x = ref[image, :, :, lanes].astype(jnp.float32)
                if number < biases.shape[0]:
                    x += biases[number : number + 1, lanes][None]
                copy[:, :, local] = _roll(x, settings.shift)

            @pl.loop(0, settings.windows[0])
            def per_row(row: jax.Array, local: slice = local, products: list[_Product] = products) -> None:
                for column in range(settings.windows[1]):
                    windows = [copy[*slices(copy, row, column), local].reshape(-1, local.stop) for copy in rolled]
                    computed = compute(image, row * settings.windows[1] + column, products, *windows)
                    for copy, x in zip(results, computed, strict=True):
                        rows, columns = slices(copy, row, column)
                        copy[rows, columns, local] = x.reshape(rows.size, columns.size, local.stop)

            for number, (ref, copy) in enumerate(zip(outputs, results, strict=True)):
                x = copy[:, :, local]
                if grad_biases is not None:
                    grad_biases[number : number + 1, lanes] += x.sum(axis=(0, 1), keepdims=True)[0]
                ref[image, :, :, lanes] = _roll(x, (-settings.shift[0], -settings.shift[1])).astype(ref.dtype)


def _differences(row: jax.Array, keys: int, lanes: int) -> jax.Array:
    """Return key minus query for all pairs, from one number per token: [1, heads * N] -> [keys, lanes]."""
    return (_dot(row[:, :keys], jnp.ones_like(row), 0, 0) - row)[:, :lanes]


def _offset_differences(offsets: Ref, image: jax.Array, window: jax.Array, keys: int, lanes: int) -> list[jax.Array]:
    """Return the differences of dy and of dx, key minus query, for all pairs; each float32 [keys, lanes]."""
    return [_differences(offsets[image, window, axis : axis + 1], keys, lanes) for axis in (0, 1)]


def _add_to_tables(
    grad_tables: Ref, terms: Terms, image: jax.Array, window: jax.Array, product: _Product, grad_logits: jax.Array
) -> None:
    """Add the gradient of each pair's logit to the gradient of the pair's case."""
    lanes = grad_logits.shape[1]
    if terms.offsets is None:
        grad_tables[product.number, 0, :, :lanes] += grad_logits
        return
    row, column = _offset_differences(terms.offsets, image, window, *grad_logits.shape)
    for case in range(9):
        pairs = (row == case // 3 - 1) & (column == case % 3 - 1)
        grad_tables[product.number, case, :, :lanes] += jnp.where(pairs, grad_logits, 0)


def _softmax(
    terms: Terms, image: jax.Array, window: jax.Array, product: _Product, k: jax.Array, q: jax.Array
) -> jax.Array:
    """Compute the softmax over keys, float32 [K, heads * Q], from keys [K, C] and spread queries [heads * Q, C]."""
    logits = _dot(k, q, 1, 1)
    keys, lanes = logits.shape
    if terms.tables is not None:
        tables = [terms.tables[product.number, case, :, :lanes] for case in range(terms.tables.shape[1])]
        if terms.offsets is None:
            logits += tables[0]
        else:
            row, column = _offset_differences(terms.offsets, image, window, keys, lanes)
            rows = [select_by_sign(column, tables[3 * case : 3 * case + 3]) for case in range(3)]
            logits += select_by_sign(row, rows)
        if terms.regions is not None:
            region_difference = _differences(terms.regions[window], keys, lanes)
            logits += jnp.where(region_difference == 0, 0.0, MASK_VALUE)
    exponentials = jnp.exp(logits - logits.max(axis=0, keepdims=True))
    return exponentials * (1 / exponentials.sum(axis=0, keepdims=True))


def _forward_kernel(settings: _Settings, maps: Maps, terms: Terms, outputs: Maps, _grad: None, *scratch: Ref) -> None:
    """Compute attention from queries, keys and values."""
    dtype = maps[0].dtype

    def compute(image: jax.Array, window: jax.Array, products: list[_Product], *windows: jax.Array) -> Maps:
        q, k, v = windows
        k, v = k.astype(dtype), v.astype(dtype)
        attended = jnp.zeros_like(q)
        for product in products:
            weights = _softmax(terms, image, window, product, k, product.spread(q * product.scale).astype(dtype))
            attended += product.collect(_dot(weights.astype(dtype), v, 0, 0))
        return (attended,)

    _apply_to_windows(settings, maps, terms.biases, outputs, None, scratch, compute)


def _backward_kernel(
    settings: _Settings, maps: Maps, terms: Terms, outputs: Maps, grad_terms: tuple[Ref, Ref | None], *scratch: Ref
) -> None:
    """Compute the gradients of queries, keys, values, biases and tables from the gradient of the output."""
    dtype = maps[0].dtype
    grad_biases, grad_tables = grad_terms

    @pl.when(pl.program_id(0) == 0)
    def zero_grad_terms() -> None:
        for grad_term in jax.tree.leaves(grad_terms):
            grad_term[...] = jnp.zeros_like(grad_term)

    def compute(image: jax.Array, window: jax.Array, products: list[_Product], *windows: jax.Array) -> Maps:
        q, k, v, gradient = windows
        k, v = k.astype(dtype), v.astype(dtype)
        grad_q, grad_k, grad_v = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
        for product in products:
            queries = product.spread(q * product.scale).astype(dtype)
            spread = product.spread(gradient).astype(dtype)
            weights = _softmax(terms, image, window, product, k, queries)
            grad_weights = _dot(v, spread, 1, 1)
            grad_logits = weights * (grad_weights - (weights * grad_weights).sum(axis=0, keepdims=True))
            if grad_tables is not None:
                _add_to_tables(grad_tables, terms, image, window, product, grad_logits)
            grad_logits = grad_logits.astype(dtype)
            grad_v += _dot(weights.astype(dtype), spread, 1, 0)
            grad_k += _dot(grad_logits, queries, 1, 0)
            grad_q += product.collect(_dot(grad_logits, k, 0, 0)) * product.scale
        return grad_q, grad_k, grad_v

    _apply_to_windows(settings, maps, terms.biases, outputs, grad_biases, scratch, compute)


def _call(
    kernel: Callable[..., None], settings: _Settings, maps: Maps, terms: Terms, outputs: Maps, grad_terms: Maps | None
) -> tuple[Maps, Maps]:
    """Run a kernel, several images per grid step; return the output maps, and gradients summed over images.

    `outputs` and `grad_terms` are arrays with the shapes and dtypes of the results.
    """
    batch, height, width, channels = maps[0].shape
    max_images = max(1, TOKENS_PER_STEP // (height * width))
    images = max(count for count in range(1, max_images + 1) if batch % count == 0)
    lanes = min(channels, LANES)

    def per_step(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((images, *array.shape[1:]), lambda step: (step, *(0,) * (array.ndim - 1)))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda step: (0,) * array.ndim)

    return pl.pallas_call(
        partial(kernel, settings),
        jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (outputs, grad_terms)),
        grid=(batch // images,),
        in_specs=(tuple(map(per_step, maps)), _map_terms(terms, per_step, whole)),
        out_specs=(tuple(map(per_step, outputs)), jax.tree.map(whole, grad_terms)),
        scratch_shapes=[pltpu.VMEM((*array.shape[1:3], lanes), jnp.float32) for array in (*maps, *outputs)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=_cost(settings, maps, terms, outputs),
        interpret=settings.interpret,
        name=kernel.__name__.strip("_"),
    )(maps, terms)


def _map_terms(terms: Terms, per_step: Callable[[Any], Any], whole: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    """Map `per_step` over the terms that belong to images, and `whole` over those that all images share."""
    return jax.tree.map(whole, terms)._replace(offsets=None if terms.offsets is None else per_step(terms.offsets))


def _cost(settings: _Settings, maps: Maps, terms: Terms, outputs: Maps) -> pl.CostEstimate:
    """Return a loose lower bound of a call's cost: matrix products, exponentials, and bytes padded to whole lanes.

    Most of the time goes to the vector unit: about ten (forward) to forty (backward, with nine cases) operations per
    pair.
    """
    (batch, height, width, channels), (_, rows, columns, _) = maps[0].shape, maps[1].shape
    pairs = batch * height * width * rows * columns // math.prod(settings.windows)

    def size(array: jax.Array) -> int:
        return math.prod((*array.shape[:-1], -(-array.shape[-1] // LANES) * LANES)) * array.dtype.itemsize

    products = 2 if len(outputs) == 1 else 5
    return pl.CostEstimate(
        flops=2 * products * pairs * channels,
        transcendentals=pairs * settings.heads,
        bytes_accessed=sum(size(array) for array in jax.tree.leaves((maps, terms, outputs))),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, maps: Maps, terms: Terms) -> jax.Array:
    (attended,), _ = _call(_forward_kernel, settings, maps, terms, maps[:1], None)
    return attended


def _forward(settings: _Settings, maps: Maps, terms: Terms) -> tuple[jax.Array, tuple[Maps, Terms]]:
    return _attend(settings, maps, terms), (maps, terms)


def _backward(settings: _Settings, residuals: tuple[Maps, Terms], gradient: jax.Array) -> tuple[Maps, Terms]:
    maps, terms = residuals
    learned = terms.biases, terms.tables
    grad_maps, (grad_biases, grad_tables) = _call(_backward_kernel, settings, (*maps, gradient), terms, maps, learned)
    return grad_maps, Terms(grad_biases, grad_tables)


_attend.defvjp(_forward, _backward)


def _on_each_device(settings: _Settings, maps: Maps, terms: Terms) -> jax.Array:
    """Run the kernel on each device for its own images; the compiler cannot partition a kernel."""
    whole = PartitionSpec()
    images = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    specs = (images,) * 3, _map_terms(terms, lambda _: images, lambda _: whole)
    attend = jax.shard_map(partial(_attend, settings), in_specs=specs, out_specs=images, check_vma=False)
    return attend(maps, terms)


def _supports(tokens: int, channels: int, heads: int) -> bool:
    """Return whether the kernel supports this number of tokens in a row of a window.

    It needs a mesh, which a compiled training step has. Pictures and probes have none; their few images do not need it.
    """
    lane_aligned = LANES % (channels // heads) == 0 or channels <= LANES
    return not jax.sharding.get_abstract_mesh().empty and tokens % SUBLANES == 0 and lane_aligned


def supports_windows(shape: tuple[int, ...], windows: Windows, heads: int) -> bool:
    """Return whether `window_attention` supports maps of a shape [B, H, W, C].

    Windows must tile the maps without padding, cut the mask units at the same places, and have at most MAX_TOKENS
    tokens. Their rows must fill whole sublanes, unless one window covers the map.
    """
    rows, columns = windows.size
    single_window = windows.size == shape[1:3]
    return (
        _supports(rows * columns if single_window else columns, shape[3], heads)
        and rows * columns <= MAX_TOKENS
        and not any(windows.padding)
        and windows.differences.shape[1] == 1
    )


def supports_all(tokens: int, first_query: int, channels: int, heads: int) -> bool:
    """Return whether `self_attention` supports this number of tokens, with queries from `first_query` on."""
    counts = (tokens, tokens - first_query)
    return tokens <= MAX_TOKENS and all(_supports(count, channels, heads) for count in counts)


def window_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, windows: Windows, tables: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Compute `attention.window_attention` if `supports_windows`; `interpret`: interpret mode, on any device."""
    maps, biases = _split_channels(qkv, x)
    tables = tables[:, 0]  # all windows share them
    batch, height, width, channels = x.shape
    counts = (height // windows.size[0], width // windows.size[1])
    if counts == (1, 1):  # one row of all tokens
        maps = tuple(x.reshape(batch, 1, height * width, channels) for x in maps)
    cases, heads, tokens, _ = tables.shape
    per_product = _heads_per_product(heads, channels, tokens)
    products = -(-heads // per_product)
    tables = jnp.pad(tables, ((0, 0), (0, products * per_product - heads), (0, 0), (0, 0)))
    tables = tables.reshape(cases, products, per_product, tokens, tokens).transpose(1, 0, 3, 2, 4)
    offsets, regions = windows.offsets, windows.regions
    terms = Terms(
        biases,
        tables.reshape(products, cases, tokens, per_product * tokens),
        None if offsets is None else jnp.tile(offsets.astype(jnp.float32), per_product),
        None if regions is None else jnp.tile(jnp.asarray(regions, jnp.float32), per_product)[:, None],
    )
    settings = _Settings(heads, counts, windows.shift, interpret)
    return proj(_on_each_device(settings, maps, terms).reshape(x.shape))


def self_attention(
    qkv: nnx.Linear, proj: nnx.Linear, x: jax.Array, heads: int, first_query: int, *, interpret: bool = False
) -> jax.Array:
    """Compute `attention.self_attention` if `supports_all`; `interpret`: interpret mode, on any device."""
    (q, k, v), biases = _split_channels(qkv, x)
    settings = _Settings(heads, (1, 1), (0, 0), interpret)
    maps = tuple(x[:, None] for x in (q[:, first_query:], k, v))
    return proj(_on_each_device(settings, maps, Terms(biases))[:, 0])


def _split_channels(qkv: nnx.Linear, x: jax.Array) -> tuple[Maps, jax.Array]:
    """Return queries, keys and values [..., heads * d] without biases, and the biases, float32 [3, heads * d]."""
    weights = jnp.split(qkv.kernel[...].astype(qkv.dtype), 3, axis=-1)
    x = x.astype(qkv.dtype)
    biases = cast(nnx.Param[jax.Array], qkv.bias)[...].reshape(3, -1)
    return tuple(jnp.einsum("...c,cd->...d", x, weight) for weight in weights), biases
