import math

import numpy as np

from tests import golden
from umae_jax.positions import sincos_table


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
