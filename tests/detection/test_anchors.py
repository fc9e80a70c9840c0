"""Anchors, against mmdet's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.detection.golden import assert_close, load
from umae_jax.detection.anchors import cells_inside, grid_anchors, inside

STRIDES = (4, 8, 16, 32, 64)
GRIDS = ((3, 4), (2, 3), (1, 2), (1, 1), (1, 1))


@pytest.mark.parametrize("level", range(5))
def test_anchors_equal_the_golden_numbers(level):
    golden, stride = load("c_anchors"), STRIDES[level]
    assert_close(f"base {level}", grid_anchors((1, 1), stride), golden[f"base{level}"])
    assert_close(f"grid {level}", grid_anchors(GRIDS[level], stride), golden[f"grid{level}"])
    grid = (-(-128 // stride), -(-160 // stride))
    flags = cells_inside(grid, stride, jnp.asarray([96, 140]))
    np.testing.assert_array_equal(np.repeat(flags, 3), golden[f"valid{level}"])


def test_anchors_inside_touch_only_the_upper_and_left_border():
    boxes = jnp.asarray([[0, 0, 9, 7], [-0.1, 0, 9, 7], [0, -0.1, 9, 7], [0, 0, 10, 7], [0, 0, 9, 8]], jnp.float32)
    np.testing.assert_array_equal(inside(boxes, jnp.asarray([8, 10])), [True, False, False, False, False])
