"""The Pallas kernel, interpreted by JAX on 8 devices, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import make_stage
from umae_jax import masking
from umae_jax.models import attention
from umae_jax.models.kernels import pallas_tpu
from umae_jax.models.layers import NO_DROP
from umae_jax.models.swin import SwinBlock
from umae_jax.models.windows import make_windows
from umae_jax.training.sharding import batch_sharding, make_mesh, replicated

TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2}  # relative to the maximum


def compare(ours, plain, heads, width, dtype, *arrays):
    """Compare values and all gradients with the plain form's in float32.

    Args:
        ours, plain: functions of two linear layers and arrays, the first of which is cast to `dtype`.
    """

    def both(function, dtype):
        rngs, channels = nnx.Rngs(0), heads * width
        qkv = nnx.Linear(channels, 3 * channels, dtype=dtype, rngs=rngs)
        qkv.bias[...] = jax.random.normal(rngs.params(), qkv.bias.shape)
        graph, state = nnx.split((qkv, nnx.Linear(channels, channels, dtype="float32", rngs=rngs)))

        @jax.jit
        def run(state, *arrays):
            def apply(state, x, *tables):
                return function(*nnx.merge(graph, state), x.astype(dtype), *tables)

            values, pull = jax.vjp(apply, state, *arrays)
            return values, pull(jnp.cos(values))

        return jax.tree.leaves(run(state, *arrays))

    for our, their in zip(both(ours, dtype), both(plain, "float32"), strict=True):
        our, their = (np.asarray(x, np.float32) for x in (our, their))
        np.testing.assert_allclose(our, their, atol=TOLERANCES[dtype] * max(1, np.abs(their).max()))


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
def test_attention_within_windows_equals_the_plain_form_s(grid, cells, window, shifted, heads, width, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (16, *grid, heads * width))
    offset = None if cells is None else masking.sample_uniform_mask(keys[1], 16, cells, 0.25).offset
    windows = make_windows(grid, window, shifted=shifted, offset=offset)
    cases, _, keys_per_window, queries, _ = windows.differences.shape
    tables = jax.random.normal(keys[2], (cases, 1, heads, keys_per_window, queries))
    with jax.set_mesh(make_mesh(2)):
        assert pallas_tpu.supports_windows(x.shape, windows, heads)
        compare(
            lambda qkv, proj, x, tables: pallas_tpu.window_attention(qkv, proj, x, windows, tables, interpret=True),
            lambda qkv, proj, x, tables: attention.window_attention(qkv, proj, x, windows, tables, heads),
            *(heads, width, dtype, x, tables),
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("queries", "heads", "width"), [(24, 2, 4), (16, 5, 32), (8, 3, 128)])
def test_attention_among_all_tokens_equals_the_plain_form_s(queries, heads, width, dtype):
    x, first = jax.random.normal(jax.random.key(0), (8, 24, heads * width)), 24 - queries
    with jax.set_mesh(make_mesh()):
        assert pallas_tpu.supports_all(24, first, heads * width, heads)
        compare(
            lambda qkv, proj, x: pallas_tpu.self_attention(qkv, proj, x, heads, first, interpret=True),
            lambda qkv, proj, x: attention.self_attention(qkv, proj, x, heads, first),
            *(heads, width, dtype, x),
        )


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
        assert not pallas_tpu.supports_windows((8, *grid, 2 * width), windows, 2)
    assert not pallas_tpu.supports_all(24, 0, 8, 2), "without a mesh"


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
