"""Position tables, and the nine cases of the position bias."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from umae_jax.positions import select_offset_case, sincos_table


def test_the_table_encodes_column_then_row():
    table = sincos_table(8, (3, 5))
    row, column = 2, 3
    expected = [
        function(place / 10000 ** (k / 2))
        for place in (column, row)
        for function in (math.sin, math.cos)
        for k in (0, 1)
    ]
    np.testing.assert_allclose(table[row, column], expected, rtol=1e-6)


def test_the_table_equals_the_reference_s():
    numbers = golden.load("swin_um_window8", large=True)
    np.testing.assert_allclose(
        sincos_table(32, (8, 8)).reshape(1, 64, 32), numbers["param/decoder_pos_embed"], atol=1e-6
    )


@pytest.mark.parametrize("windows", [1, 4])
def test_each_pair_has_the_value_of_its_case(windows):
    keys = jax.random.split(jax.random.key(0), 3)
    tables = jax.random.normal(keys[0], (9, windows, 3, 5, 6))
    row, column = (np.asarray(jax.random.randint(key, (2, 4, 5, 6), -1, 2, jnp.int8)) for key in keys[1:3])
    selected = np.asarray(select_offset_case(tables, row, column))
    tables = np.broadcast_to(tables, (9, 4, 3, 5, 6))
    for image, window, head, key, query in np.ndindex(selected.shape):
        case = 3 * (row[image, window, key, query] + 1) + column[image, window, key, query] + 1
        assert selected[image, window, head, key, query] == tables[case, window, head, key, query]
