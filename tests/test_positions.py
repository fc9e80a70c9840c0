import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden
from umae_jax.positions import select_case, sincos_table
from umae_jax.training.sharding import make_mesh


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


def test_the_table_is_the_reference_s():
    numbers = golden.load("swin_um_window8")
    np.testing.assert_allclose(
        sincos_table(32, (8, 8)).reshape(1, 64, 32), numbers["param/decoder_pos_embed"], atol=1e-6
    )


@pytest.mark.parametrize("windows", [1, 4])
def test_gradients_of_the_cases_are_summed_alike_on_processors(windows):
    keys = jax.random.split(jax.random.key(0), 4)
    tables = jax.random.normal(keys[0], (9, windows, 3, 5, 6))
    row, column = (jax.random.randint(key, (8, 4, 5, 6), -1, 2, jnp.int8) for key in keys[1:3])
    gradient = jax.random.normal(keys[3], (8, 4, 3, 5, 6))

    @jax.jit
    def both(tables, row, column):
        chosen, pull = jax.vjp(lambda tables: select_case(tables, row, column), tables)
        return chosen, *pull(gradient)

    plain = both(tables, row, column)
    jax.clear_caches()  # a trace does not know what it was made for
    with jax.set_mesh(make_mesh()):
        chosen, of_tables = both(tables, row, column)
    np.testing.assert_array_equal(chosen, plain[0])
    np.testing.assert_allclose(of_tables, plain[1], rtol=1e-5, atol=1e-5)
    case = np.asarray(3 * row + column + 4)
    for number in range(9):
        share = np.where((case == number)[:, :, None], gradient, 0).sum(0)
        share = share.sum(0, keepdims=True) if windows == 1 else share
        np.testing.assert_allclose(of_tables[number], share, rtol=1e-5, atol=1e-5)
