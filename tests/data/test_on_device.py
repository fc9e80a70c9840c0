import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from umae_jax.data.on_device import mix, random_erase, random_flip, sample_keys, smooth_targets

ONE_HOT = jax.nn.one_hot


def keys_of(count, seed=0):
    return sample_keys(seed, jnp.arange(count, dtype=jnp.uint32))


def constant_images(count, side=16):
    """Return images whose every value is their index."""
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, side, side, 3))


def test_smoothing_spreads_over_all_classes():
    targets = smooth_targets(jnp.array([0, 3]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.925, 0.025, 0.025, 0.025], [0.025, 0.025, 0.025, 0.925]], atol=1e-6)


def test_erasing_fills_one_rectangle_of_the_allowed_size_with_noise():
    images = jnp.full((400, 32, 32, 3), 7.0)
    erased = np.asarray(jax.jit(random_erase, static_argnums=2)(images, keys_of(400), 0.25))
    changed = (erased != 7).all(-1)
    assert ((erased == 7).all(-1) | changed).all()  # all channels of a pixel or none
    touched = changed.any((1, 2))
    assert 70 <= touched.sum() <= 130
    noise = erased[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    for mask in changed[touched]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width  # a whole rectangle
        assert 0.01 <= height * width / 32**2 <= 0.36
        assert 0.2 <= height / width <= 5


def test_erasing_with_probability_zero_and_one():
    images = constant_images(8, 32)
    np.testing.assert_array_equal(random_erase(images, keys_of(8), 0.0), images)
    assert (np.asarray(random_erase(images + 100, keys_of(8), 1.0)) != np.asarray(images) + 100).any((1, 2, 3)).all()


def test_mixup_averages_neighbours_with_the_weights_of_their_targets():
    images, targets = constant_images(64), ONE_HOT(jnp.arange(64), 64)
    mixed, shares = (np.asarray(x) for x in mix(images, targets, keys_of(64), mixup=0.8, cutmix=0.0))
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(mixed, (shares @ np.arange(64))[:, None, None, None] * np.ones((16, 16, 3)), rtol=1e-4)
    for place in range(64):
        assert set(np.flatnonzero(shares[place] > 1e-6)) <= {place, place ^ 1}


def test_mixup_weights_follow_the_beta_distribution():
    count = 2000
    images, targets = jnp.zeros((count, 1, 1, 1)), ONE_HOT(jnp.arange(count) % 2, 2)
    _, shares = mix(images, targets, keys_of(count), mixup=0.8, cutmix=0.0)
    own = np.asarray(shares)[np.arange(count), np.arange(count) % 2]
    assert scipy.stats.kstest(own, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_cutmix_pastes_a_rectangle_and_weights_targets_by_its_pixels():
    images, targets = constant_images(64), ONE_HOT(jnp.arange(64), 64)
    mixed, shares = (np.asarray(x) for x in mix(images, targets, keys_of(64), mixup=0.0, cutmix=1.0))
    for place in range(64):
        own = mixed[place, ..., 0] == place
        assert set(np.unique(mixed[place])) <= {float(place), float(place ^ 1)}
        assert shares[place, place] == pytest.approx(own.mean(), abs=1e-5)
        pasted = ~own
        if pasted.any():
            rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            assert pasted.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_each_image_draws_mixup_or_cutmix():
    images, targets = constant_images(400), ONE_HOT(jnp.arange(400), 400)
    mixed, _ = mix(images, targets, keys_of(400), mixup=0.8, cutmix=1.0)
    whole = np.asarray(mixed)[..., 0]
    added = (whole != np.floor(whole)).any((1, 2)).sum()
    assert 150 <= added <= 250


def test_draws_depend_on_the_image_alone():
    """Neither the rest of the batch nor the pair's place in it matters."""
    images, targets = constant_images(8), ONE_HOT(jnp.arange(8), 8)
    moved = jnp.array([4, 5, 0, 1])
    whole = mix(images, targets, keys_of(8), mixup=0.8, cutmix=1.0)
    some = mix(images[moved], targets[moved], keys_of(8)[moved], mixup=0.8, cutmix=1.0)
    for ours, theirs in zip(some, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[moved])
    np.testing.assert_array_equal(
        random_erase(images, keys_of(8), 0.5)[moved], random_erase(images[moved], keys_of(8)[moved], 0.5)
    )


def test_without_mixup_and_cutmix_nothing_changes():
    images, targets = constant_images(3), ONE_HOT(jnp.arange(3), 3)
    assert mix(images, targets, keys_of(3), mixup=0.0, cutmix=0.0) == (images, targets)


def test_flips_are_drawn_per_sample_with_probability_one_half():
    keys = sample_keys(3, jnp.arange(1000, dtype=jnp.uint32))
    images = jnp.broadcast_to(jnp.arange(4, dtype=jnp.uint8)[None, None, :, None], (1000, 2, 4, 1))
    flipped = np.asarray(random_flip(images, keys))[:, 0, 0, 0] == 3
    assert 430 < flipped.sum() < 570
    some = sample_keys(3, jnp.array([700, 5], jnp.uint32))
    np.testing.assert_array_equal(np.asarray(random_flip(images[:2], some))[:, 0, 0, 0] == 3, flipped[[700, 5]])
