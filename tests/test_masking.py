"""Properties of uniform and random masks over shapes and seeds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small import original_coordinates
from umae_jax import masking
from umae_jax.random_masking import sample_random_mask

sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=12, deadline=None)


def draw(seed, batch, cells, ratio=0.25):
    return masking.sample_uniform_mask(jax.random.key(seed), batch, cells, ratio)


def draw_random(seed, batch, cells, ratio=0.25):
    return sample_random_mask(jax.random.key(seed), batch, cells, ratio)


def random_map(seed, batch, cells, side, channels):
    shape = (batch, 2 * cells[0] * side, 2 * cells[1] * side, channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sampled_units(offset):
    """An independent oracle: bool over the unit grid, True for sampled units."""
    batch, rows, columns = offset.shape
    flags = np.zeros((batch, 2 * rows, 2 * columns), bool)
    for image, row, column in np.ndindex(offset.shape):
        dy, dx = divmod(int(offset[image, row, column]), 2)
        flags[image, 2 * row + dy, 2 * column + dx] = True
    return flags


@quick
@given(seeds, sizes, st.integers(1, 3), st.floats(0, 0.99))
def test_a_uniform_mask_samples_one_unit_per_cell_and_hides_the_exact_number_of_units(seed, cells, batch, ratio):
    mask = draw(seed, batch, cells, ratio)
    assert mask.offset.shape == mask.hidden.shape == (batch, *cells)
    assert mask.offset.dtype == jnp.int32
    assert mask.hidden.dtype == jnp.bool_
    flags = sampled_units(np.asarray(mask.offset))
    assert (flags.reshape(batch, cells[0], 2, cells[1], 2).sum((2, 4)) == 1).all()
    count = cells[0] * cells[1]
    assert (count - np.asarray(mask.hidden).sum((1, 2)) == math.floor(count * (1 - ratio))).all()


@quick
@given(seeds, sizes, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_sampled_and_masked_units_assemble_to_the_image(seed, cells, batch, side, channels):
    mask = draw(seed, batch, cells)
    x = random_map(seed, batch, cells, side, channels)
    sampled, masked = mask.compact(x), mask.masked_units(x)
    assert sampled.shape == (batch, cells[0] * side, cells[1] * side, channels)
    assert masked.shape == (batch, 3, *sampled.shape[1:])
    np.testing.assert_array_equal(mask.assemble(sampled, masked), x)


@quick
@given(seeds, sizes, st.integers(1, 3))
def test_assembling_the_sampled_units_alone_restores_their_places(seed, cells, side):
    mask = draw(seed, 2, cells)
    x = random_map(seed, 2, cells, side, 3)
    scattered = mask.assemble(mask.compact(x), jnp.zeros((1, 1, 1, 1, 1)))
    flags = sampled_units(np.asarray(mask.offset)).repeat(side, 1).repeat(side, 2)[..., None]
    np.testing.assert_array_equal(scattered, np.where(flags, x, 0))


@quick
@given(seeds, sizes, st.integers(1, 4))
def test_compacted_tokens_come_from_their_original_coordinates(seed, cells, side):
    mask = draw(seed, 2, cells)
    rows, columns = 2 * cells[0] * side, 2 * cells[1] * side
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).astype(np.int32)
    np.testing.assert_array_equal(mask.compact(jnp.asarray(grid)[None]), original_coordinates(mask.offset, side))


def unit_at(x, unit, cells, side):
    """Return one unit of one image, [side, side, C], by its row-major index."""
    row, column = divmod(int(unit), 2 * cells[1])
    return x[row * side : (row + 1) * side, column * side : (column + 1) * side]


@jax.jit
def split_and_assemble(mask, x):
    sampled, masked = mask.compact(x), mask.masked_units(x)
    alone = mask.assemble(sampled, jnp.zeros((1, 1, 1, 1, 1)))
    return sampled, masked, mask.assemble(sampled, masked), alone


def four_maps(x, order, side):
    """An independent oracle, unit by unit: the four maps [B, 4, rows * side, columns * side, C]."""
    batch, _, rows, columns = order.shape
    maps = np.empty((batch, 4, rows * side, columns * side, x.shape[-1]), x.dtype)
    for image, number, row, column in np.ndindex(order.shape):
        place = maps[image, number, row * side : (row + 1) * side, column * side : (column + 1) * side]
        place[...] = unit_at(x[image], order[image, number, row, column], (rows, columns), side)
    return maps


@quick
@given(seeds, sizes, st.integers(1, 3), st.floats(0, 0.99))
def test_a_random_mask_is_a_permutation_of_units_and_hides_the_exact_number_of_units(seed, cells, batch, ratio):
    mask = draw_random(seed, batch, cells, ratio)
    assert mask.order.shape == (batch, 4, *cells)
    assert mask.hidden.shape == (batch, *cells)
    assert mask.order.dtype == jnp.int32
    assert mask.hidden.dtype == jnp.bool_
    count = cells[0] * cells[1]
    assert (np.sort(np.asarray(mask.order).reshape(batch, -1)) == np.arange(4 * count)).all()
    assert (count - np.asarray(mask.hidden).sum((1, 2)) == math.floor(count * (1 - ratio))).all()


@quick
@given(seeds, sizes, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_a_random_mask_splits_and_assembles_an_image(seed, cells, batch, side, channels):
    mask = draw_random(seed, batch, cells)
    x = random_map(seed, batch, cells, side, channels)
    sampled, masked, whole, alone = split_and_assemble(mask, x)
    maps = four_maps(x, np.asarray(mask.order), side)
    np.testing.assert_array_equal(sampled, maps[:, 0])
    np.testing.assert_array_equal(masked, maps[:, 1:])
    np.testing.assert_array_equal(whole, x)
    # Alone, the sampled units return to their places.
    flags = np.zeros((batch, 4 * cells[0] * cells[1]), bool)
    np.put_along_axis(flags, np.asarray(mask.order[:, 0]).reshape(batch, -1), True, axis=1)
    flags = flags.reshape(batch, 2 * cells[0], 2 * cells[1]).repeat(side, 1).repeat(side, 2)[..., None]
    np.testing.assert_array_equal(alone, np.where(flags, x, 0))


@pytest.mark.parametrize("sample", [draw, draw_random])
def test_one_map_broadcasts_over_the_masks_of_a_batch(sample):
    mask = sample(4, 3, (2, 3))
    x = random_map(4, 1, (2, 3), 2, 5)
    copies = np.repeat(x, 3, axis=0)
    np.testing.assert_array_equal(mask.compact(x), mask.compact(copies))
    np.testing.assert_array_equal(mask.masked_units(x), mask.masked_units(copies))
    np.testing.assert_array_equal(mask.assemble(mask.compact(x), mask.masked_units(x)), copies)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.bool_])
@pytest.mark.parametrize("sample", [draw, draw_random])
def test_maps_keep_their_dtype(sample, dtype):
    mask = sample(4, 2, (2, 3))
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3)).astype(dtype)
    sampled, masked = mask.compact(x), mask.masked_units(x)
    assert sampled.dtype == masked.dtype == dtype
    whole = mask.assemble(sampled, masked)
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole, x)


def test_all_orders_of_a_random_mask_are_equally_likely():
    orders = np.asarray(draw_random(3, 6000, (1, 1)).order).reshape(-1, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_units_and_hidden_units_of_random_masks_are_equally_likely():
    mask = draw_random(3, 4000, (2, 2))
    order = np.asarray(mask.order).reshape(-1, 16)
    for place in range(16):
        assert scipy.stats.chisquare(np.bincount(order[:, place], minlength=16)).pvalue > 1e-4
    # The hidden place is uniform over four places, and independent of the unit at that place.
    hidden = np.asarray(mask.hidden).reshape(-1, 4)
    assert scipy.stats.chisquare(hidden.sum(0)).pvalue > 1e-4
    table = [np.bincount(order[:, :4][hidden == flag], minlength=16) for flag in (False, True)]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_offsets_and_hidden_units_of_uniform_masks_are_equally_likely():
    mask = draw(3, 4000, (2, 2))
    for cell in np.ndindex(2, 2):
        offsets = np.bincount(np.asarray(mask.offset[:, *cell]), minlength=4)
        assert scipy.stats.chisquare(offsets).pvalue > 1e-4
    # The hidden unit is uniform over four units, and independent of the drawn offset.
    hidden = np.asarray(mask.hidden).reshape(-1, 4)
    assert scipy.stats.chisquare(hidden.sum(0)).pvalue > 1e-4
    table = [np.bincount(np.asarray(mask.offset)[np.asarray(mask.hidden) == flag], minlength=4) for flag in (0, 1)]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


SAMPLERS = (masking.sample_uniform_mask, sample_random_mask)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_mask_depends_only_on_the_key_of_its_image(sample):
    keys = jax.random.split(jax.random.key(0), 6)
    together = sample(keys, 6, (3, 4), 0.25)
    for image in range(6):
        alone = sample(keys[image : image + 1], 1, (3, 4), 0.25)
        jax.tree.map(lambda a, b, image=image: np.testing.assert_array_equal(a[0], b[image]), alone, together)
    assert len(np.unique(np.asarray(together[0]).reshape(6, -1), axis=0)) == 6


@pytest.mark.parametrize("sample", SAMPLERS)
def test_masks_work_under_jit_and_vmap(sample):
    key = jax.random.key(1)
    compiled = jax.jit(sample, static_argnums=(1, 2, 3))(key, 2, (2, 3), 0.25)
    jax.tree.map(np.testing.assert_array_equal, compiled, sample(key, 2, (2, 3), 0.25))
    many = jax.vmap(lambda key: sample(key, 2, (2, 3), 0.25))(jax.random.split(key, 5))
    x = random_map(0, 2, (2, 3), 2, 3)
    stacked = jax.jit(jax.vmap(lambda mask: mask.compact(x)))(many)
    fifth = jax.tree.map(lambda array: array[4], many)
    np.testing.assert_array_equal(stacked[4], fifth.compact(x))


def test_raw_uint32_keys_are_accepted():
    raw = masking.sample_uniform_mask(jax.random.PRNGKey(5), 2, (2, 2), 0.25)
    typed = masking.sample_uniform_mask(jax.random.key(5), 2, (2, 2), 0.25)
    np.testing.assert_array_equal(raw.offset, typed.offset)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_another_number_of_keys_than_images_raises(sample):
    with pytest.raises(ValueError, match="key"):
        sample(jax.random.split(jax.random.key(0), 3), 2, (2, 2), 0.25)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_raises(ratio):
    for sample in (draw, draw_random):
        with pytest.raises(ValueError, match="secondary_ratio"):
            sample(0, 1, (2, 2), ratio)


@pytest.mark.parametrize("shape", [(1, 8, 6, 3), (1, 7, 8, 3), (1, 2, 2, 3)])
def test_a_map_that_does_not_divide_into_cells_raises(shape):
    with pytest.raises(ValueError, match="does not divide"):
        draw(0, 1, (2, 2)).compact(jnp.zeros(shape))
    with pytest.raises(ValueError, match="does not divide"):
        draw_random(0, 1, (2, 2)).compact(jnp.zeros(shape))
