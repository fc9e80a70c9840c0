"""Swin: position bias, window attention against a pairwise reference, and initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import build, make_stage
from tests.small import original_coordinates
from umae_jax import masking
from umae_jax.models.layers import NO_DROP
from umae_jax.models.swin import PositionBias, SwinBlock
from umae_jax.models.windows import MASK_VALUE, make_windows


def position_bias(position, difference):
    """Return one bias per head for coordinate differences [..., 2], as written in SPEC 3."""
    scaled = jnp.sign(difference) * jnp.log1p(jnp.abs(difference))
    return position.fc2(jax.nn.relu(position.fc1(scaled)))


def direct_bias(position, windows, offset, grid):
    """Apply the MLP to the original coordinates of each pair of tokens in each window, image by image."""
    tokens_per_cell = grid[0] / offset.shape[1]
    if tokens_per_cell >= 1:
        coordinates = jnp.asarray(original_coordinates(offset, int(tokens_per_cell)), jnp.float32)
    else:  # the merge keeps the top-left coordinates of each group, divided by 2
        every = int(1 / tokens_per_cell)
        coordinates = jnp.asarray(original_coordinates(offset, 1)[:, ::every, ::every], jnp.float32) / every
    cut = windows.partition(coordinates)
    return position_bias(position, cut[:, :, :, None, :] - cut[:, :, None, :, :]).transpose(0, 1, 4, 2, 3)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "cells", "window"),
    [
        ((16, 16), (4, 4), 8),  # stage 1: windows of 2 x 2 units
        ((16, 16), (4, 4), 4),  # windows of one unit; shifted ones cut through units
        ((24, 12), (6, 3), 6),  # windows that cut the units at different places
        ((16, 8), (4, 2), 8),  # a window as wide as the grid
        ((8, 8), (4, 4), 4),  # stage 2
        ((4, 4), (4, 4), 8),  # stage 3, one window
        ((4, 8), (8, 16), 2),  # stage 4: a token spans 2 x 2 units
        ((2, 4), (8, 16), 2),  # a fifth stage: a token spans 4 x 4 units
    ],
)
def test_the_nine_cases_give_the_direct_bias_of_every_pair(grid, cells, window, shifted):
    position = PositionBias(3, 8, rngs=nnx.Rngs(0))
    offset = masking.sample_uniform_mask(jax.random.key(2), 3, cells, 0.25).offset

    windows = make_windows(grid, window, shifted=shifted, offset=offset)
    ours, direct = windows.pair_bias(position(windows)), direct_bias(position, windows, offset, grid)
    mask = windows.mask
    if mask is not None:
        across = np.broadcast_to(mask[None, :, None] != 0, ours.shape)
        assert (np.asarray(ours)[across] < MASK_VALUE / 2).all()
        ours, direct = np.where(across, 0, ours), np.where(across, 0, direct)
    np.testing.assert_allclose(ours, direct, atol=1e-5)


def test_the_bias_on_a_whole_image_equals_the_direct_bias():
    position = PositionBias(2, 8, rngs=nnx.Rngs(0))
    windows = make_windows((8, 8), 4, shifted=False, offset=None)
    place = jnp.arange(4, dtype=jnp.float32)
    coordinates = jnp.stack(jnp.meshgrid(place, place, indexing="ij"), -1).reshape(-1, 2)
    direct = position_bias(position, coordinates[:, None] - coordinates[None, :]).transpose(2, 0, 1)
    np.testing.assert_allclose(windows.pair_bias(position(windows))[0, 0], direct, atol=1e-5)


def visible_pairs(grid, window, shifted):
    """Return the pairs of tokens that attend to each other, bool [N, N].

    Along each axis, windows start at multiples of `window`, plus `window // 2` if shifted; the tokens before the first
    shifted window form a region of their own. An axis no longer than a window is one window.
    """

    def window_of(place, size):
        if size <= window:
            return 0
        return (place - (window // 2 if shifted else 0)) // window

    places = [(window_of(row, grid[0]), window_of(column, grid[1])) for row, column in np.ndindex(*grid)]
    return np.array([[one == other for other in places] for one in places])


@jax.jit
def block_by_pairs(block, x, coordinates, allowed):
    """Compute the block as written in SPEC 3, over all pairs of tokens of the grid, masked by `allowed`."""
    batch, rows, columns, width = x.shape
    tokens = x.reshape(batch, rows * columns, width)
    qkv = block.qkv(block.norm1(tokens)).reshape(batch, -1, 3, block.heads, width // block.heads)
    q, k, v = (qkv[:, :, part] for part in range(3))
    bias = position_bias(block.position, coordinates[:, None, :] - coordinates[:, :, None])
    weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias.transpose(0, 3, 1, 2))
    weights = jnp.where(allowed[None, None], weights, 0)
    weights = weights / weights.sum(-1, keepdims=True)
    tokens = tokens + block.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(tokens.shape))
    return (tokens + block.mlp(block.norm2(tokens))).reshape(x.shape)


def make_block():
    return SwinBlock(make_stage(8, 2, 2), NO_DROP, position_width=4, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((8, 8), 4),
        ((6, 10), 4),  # padded along both axes
        ((8, 5), 4),  # padded along one axis
        ((9, 9), 4),  # three tokens of padding
        ((7, 6), 6),  # five tokens of padding
        ((3, 10), 4),  # smaller than a window along one axis
        ((4, 4), 8),
    ],
)
def test_a_block_on_a_whole_image_equals_the_pairwise_reference(grid, window, shifted):
    block = make_block()
    x = jax.random.normal(jax.random.key(1), (2, *grid, 8))
    windows = make_windows(grid, window, shifted=shifted, offset=None)
    coordinates = jnp.asarray(list(np.ndindex(*grid)), jnp.float32)[None]
    expected = block_by_pairs(block, x, coordinates, visible_pairs(grid, window, shifted))
    ours = jax.jit(lambda block, x: block(x, windows, None))(block, x)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "cells", "window"), [((8, 12), (4, 6), 4), ((8, 12), (2, 3), 4), ((4, 8), (2, 4), 4)])
def test_a_block_on_the_compact_grid_equals_the_pairwise_reference(grid, cells, window, shifted):
    block = make_block()
    x = jax.random.normal(jax.random.key(1), (2, *grid, 8))
    offset = masking.sample_uniform_mask(jax.random.key(2), 2, cells, 0.25).offset
    windows = make_windows(grid, window, shifted=shifted, offset=offset)
    coordinates = jnp.asarray(original_coordinates(offset, grid[0] // cells[0]).reshape(2, -1, 2), jnp.float32)
    expected = block_by_pairs(block, x, coordinates, visible_pairs(grid, window, shifted))
    ours = jax.jit(lambda block, x: block(x, windows, None))(block, x)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [((8, 8), 4), ((6, 10), 4)])
def test_a_token_depends_on_exactly_the_tokens_of_its_window(grid, window):
    """The gradient of a token's output is nonzero for all tokens of its window and zero for all others."""
    block = make_block()
    x = jax.random.normal(jax.random.key(1), (1, *grid, 8))
    weights = jax.random.normal(jax.random.key(2), (8,))
    windows = make_windows(grid, window, shifted=True, offset=None)
    jacobian = jax.jit(jax.jacrev(lambda x: block(x, windows, None)[0] @ weights))(x)[:, :, 0]
    depends = np.asarray((jacobian != 0).any(-1)).reshape(grid[0] * grid[1], -1)
    np.testing.assert_array_equal(depends, visible_pairs(grid, window, True))


def test_initialisation():
    """Check the standard deviation of each kind of parameter (SPEC 9)."""
    model = build("swin_um_window8", widths=(64, 128, 256, 512), depths=(1, 1, 1, 1), position_width=64)
    block, merge = model.encoder.stages[1].blocks[0], model.encoder.stages[1].merge
    expected = {  # standard deviations; Xavier uniform has sqrt(2 / (inputs + outputs))
        "patch": (model.encoder.patch_embed.kernel, (2 / (48 + 64)) ** 0.5),
        "qkv": (block.qkv.kernel, (2 / (128 + 384)) ** 0.5),
        "mlp": (block.mlp.fc1.kernel, (2 / (128 + 512)) ** 0.5),
        "decoder": (model.decoder_embed.kernel, (2 / (512 + 4 * 32)) ** 0.5),
        "merge": (merge.proj.kernel, (2 / (4 * 128)) ** 0.5),
        "position, first": (block.position.fc1.kernel, (2 / 64) ** 0.5),
        "position, second": (block.position.fc2.kernel, (2 / 2) ** 0.5),
        "token": (model.mask_token, 0.02),
        "decoder token": (model.decoder_mask_token, 0.02),
    }
    for name, (parameter, deviation) in expected.items():
        tolerance = 5 / (2 * parameter.size) ** 0.5
        assert float(parameter[...].std()) == pytest.approx(deviation, rel=tolerance), name
    for norm in (model.encoder.norm, model.encoder.patch_norm, merge.norm, block.norm1, model.decoder_norm):
        assert (np.asarray(norm.scale[...]) == 1).all()
        assert (np.asarray(norm.bias[...]) == 0).all()
    for layer in (model.encoder.patch_embed, merge.proj, block.qkv, block.position.fc1, model.decoder_prediction):
        assert (np.asarray(layer.bias[...]) == 0).all()


@pytest.mark.parametrize("window", [6, 12])
def test_the_proposed_windows_fit(window):
    assert build("swin_um_window8", image_size=(192, 192), window=window).encoder.window == window
