"""The Pallas kernel, interpreted by JAX on 8 devices, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import make_stage
from umae_jax import masking
from umae_jax.models.attention import attend
from umae_jax.models.drop_path import NO_DROP
from umae_jax.models.kernels.pallas_tpu import attend_in_windows, attend_to_all, supports_all, supports_windows
from umae_jax.models.swin import SwinBlock
from umae_jax.models.windows import make_windows
from umae_jax.training.sharding import batch_sharding, make_mesh, replicated

TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2}  # relative to the maximum


def draw(*shapes, dtype):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_heads(x, heads):
    """[..., N, heads * d] -> [..., heads, d, N]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -3, -1)


def by_tokens(x):
    """[..., heads, d, N] -> [..., N, heads * d]."""
    return jnp.moveaxis(x, -1, -3).reshape(*x.shape[:-3], x.shape[-1], -1)


def add(maps, biases):
    wide = [
        x.astype(jnp.float32) + jnp.expand_dims(bias, range(x.ndim - 1)) for x, bias in zip(maps, biases, strict=True)
    ]
    return [x.astype(maps[0].dtype) for x in wide]


def plain_in_windows(q, k, v, windows, tables):
    heads = tables.shape[1]
    attended = attend(*(by_heads(windows.cut(x), heads) for x in (q, k, v)), windows.bias_of_pairs(tables[:, None]))
    return windows.join(by_tokens(attended), q.shape[1:3])


def compare(ours, plain, arguments, gradient):
    """Values and every gradient."""

    def both(function):
        def run(*arguments):
            values, pull = jax.vjp(function, *arguments)
            return values, pull(gradient)

        return jax.tree.leaves(jax.jit(run)(*arguments))

    tolerance = TOLERANCES[str(gradient.dtype)]
    for our, their in zip(both(ours), both(plain), strict=True):
        assert our.dtype == their.dtype
        our, their = (np.asarray(x, np.float32) for x in (our, their))
        np.testing.assert_allclose(our, their, atol=tolerance * max(1, np.abs(their).max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("grid", "cells", "window", "shifted", "heads", "width"),
    [
        ((16, 16), (4, 4), 8, False, 3, 4),
        ((16, 16), (4, 4), 8, True, 3, 4),
        ((8, 8), (8, 8), 8, True, 6, 32),  # one window; heads that fill lanes once and a half
        ((4, 4), (8, 8), 8, False, 2, 4),  # tokens that span several units
        ((8, 32), None, 16, True, 2, 4),  # a whole image, shifted along one axis
        ((16, 8), None, 8, False, 5, 4),
    ],
)
def test_windows_equal_the_plain_form_s(grid, cells, window, shifted, heads, width, dtype):
    batch = 16
    *maps, gradient = draw(*[(batch, *grid, heads * width)] * 4, dtype=dtype)
    offset = None if cells is None else masking.sample_uniform_mask(jax.random.key(1), batch, cells, 0.25).offset
    windows = make_windows(grid, window, shifted=shifted, offset=offset)
    tokens = windows.size[0] * windows.size[1]
    table = (1 if cells is None else 9, heads, tokens, tokens)
    biases, tables = draw((3, heads * width), table, dtype="float32")
    with jax.set_mesh(make_mesh(2)):
        assert supports_windows(gradient.shape, windows, heads)
        compare(
            lambda maps, biases, tables: attend_in_windows(maps, biases, windows, tables, interpret=True),
            lambda maps, biases, tables: plain_in_windows(*add(maps, biases), windows, tables),
            (tuple(maps), biases, tables),
            gradient,
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("queries", "heads", "width"), [(24, 2, 4), (16, 5, 32), (8, 3, 128)])
def test_attention_among_all_tokens_equals_the_plain_form_s(queries, heads, width, dtype):
    wide = heads * width
    *maps, gradient = draw(*((8, count, wide) for count in (queries, 24, 24, queries)), dtype=dtype)
    (biases,) = draw((3, wide), dtype="float32")

    def plain(maps, biases):
        return by_tokens(attend(*(by_heads(x, heads) for x in add(maps, biases))))

    with jax.set_mesh(make_mesh()):
        assert supports_all(24, 24 - queries, wide, heads)
        compare(lambda *x: attend_to_all(*x, heads, interpret=True), plain, (tuple(maps), biases), gradient)


@pytest.mark.parametrize(
    ("grid", "cells", "window", "width"),
    [
        ((24, 12), (6, 3), 6, 8),  # rows of windows that are no whole sublanes
        ((24, 24), (3, 3), 12, 8),  # and windows that cut the units at different places
        ((12, 16), None, 8, 8),  # padded
        ((64, 64), None, 64, 8),  # too many tokens
        ((16, 16), None, 8, 96),  # heads that fill no lanes
    ],
)
def test_other_windows_are_not_supported(grid, cells, window, width):
    offset = None if cells is None else jnp.zeros((8, *cells), jnp.int32)
    windows = make_windows(grid, window, shifted=False, offset=offset)
    with jax.set_mesh(make_mesh()):
        assert not supports_windows((8, *grid, 2 * width), windows, 2)
    assert not supports_all(24, 0, 8, 2), "without a mesh"


def test_a_block_of_the_paper_s_sizes_compiles_for_tpus(tpus):
    mesh = make_mesh(2, tpus)
    block = SwinBlock(make_stage(96, 3, 4), NO_DROP, position_width=32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    block.fused_attention = True
    graph, params = nnx.split(block)

    def loss(params, x, offset):
        windows = make_windows((32, 32), 8, shifted=True, offset=offset)
        return nnx.merge(graph, params)(x, windows, None).sum()

    def shaped(sharding, *arrays):
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arrays)

    arrays = jnp.zeros((8, 32, 32, 96), jnp.bfloat16), jnp.zeros((8, 8, 8), jnp.int32)
    arguments = shaped(replicated(mesh), params) + shaped(batch_sharding(mesh), *arrays)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=replicated(mesh)).lower(*arguments)
    program = lowered.compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward
    assert "all-reduce" in program
    assert "all-gather" not in program
