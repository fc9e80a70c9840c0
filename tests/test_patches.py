"""Patches, and the order of their pixels."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from umae_jax.patches import patchify, pixel_shuffle, unpatchify

sizes = st.integers(1, 4)


@settings(max_examples=20, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_patches_order_pixels_by_row_column_and_channel(rows, columns, side, channels):
    x = np.arange(2 * rows * side * columns * side * channels).reshape(2, rows * side, columns * side, channels)
    patches = patchify(x, side)
    last = x[1, -side:, -side:].reshape(-1)
    np.testing.assert_array_equal(patches[1, -1, -1], last)
    np.testing.assert_array_equal(unpatchify(patches, side), x)


def test_pixel_shuffle_is_channel_major():
    factor, channels = 2, 3
    x = np.random.default_rng(0).normal(size=(1, 2, 3, channels * factor**2)).astype(np.float32)
    out = np.asarray(pixel_shuffle(x, factor))
    assert out.shape == (1, 4, 6, channels)
    for row, column, c, i, j in np.ndindex(2, 3, channels, factor, factor):
        assert out[0, 2 * row + i, 2 * column + j, c] == x[0, row, column, c * factor**2 + i * factor + j]
