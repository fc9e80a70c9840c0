"""Properties of random samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from umae_jax.detection.sampling import sample

TOTAL = 40


@functools.cache
def sampler(count, max_positive):
    return jax.jit(functools.partial(sample, count=count, max_positive=max_positive))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=TOTAL, max_size=TOTAL),
    st.sampled_from([(16, 4), (16, 16), (60, 30)]),
)
def test_invariants(seed, rows, sizes):
    count, max_positive = sizes
    gt_index, candidates = (np.array(column) for column in zip(*rows, strict=True))
    result = sampler(*sizes)(jax.random.key(seed), gt_index.astype(np.int32), candidates)
    index, positive, valid = map(np.asarray, result)
    assert index.shape == positive.shape == valid.shape == (count,)
    positives, negatives = (np.flatnonzero(candidates & side) for side in (gt_index > 0, gt_index == 0))
    assert positive.sum() == min(len(positives), max_positive)
    assert (valid & ~positive).sum() == min(len(negatives), count - positive.sum())
    assert not positive[~valid].any()
    assert not index[~valid].any()
    assert (np.diff(2 * positive + 2 * valid) <= 0).all()  # positives, negatives, unused
    assert set(index[positive]) <= set(positives)
    assert set(index[valid & ~positive]) <= set(negatives)
    for part in (index[positive], index[valid & ~positive]):
        assert (np.diff(part) > 0).all()


def test_all_subsets_of_positives_and_negatives_are_equally_likely():
    gt_index = jnp.asarray([1, 0, 2, 0, -1, 1, 0, 0], jnp.int32)
    draw = jax.vmap(lambda key: sample(key, gt_index, gt_index > -2, count=4, max_positive=2))
    draws = 6000
    result = draw(jax.random.split(jax.random.key(0), draws))
    pairs, counts = np.unique(result.index, axis=0, return_counts=True)
    assert len(pairs) == 3 * 6  # 2 of 3 positives and, independently, 2 of 4 negatives
    expected = draws / len(pairs)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 40.8  # 0.1 % of the distribution with 17 degrees of freedom


def test_a_sample_depends_on_its_own_key_and_image_only():
    gt_index = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, TOTAL)), jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    candidates = jnp.ones((3, TOTAL), bool)
    together = jax.vmap(sampler(16, 4))(keys, gt_index, candidates)
    for image in range(3):
        alone = sampler(16, 4)(keys[image], gt_index[image], candidates[image])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[image], b)
    other = sampler(16, 4)(keys[1], gt_index[0], candidates[0])
    assert (other.index != together.index[0]).any()
