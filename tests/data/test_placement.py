import collections
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umae_jax.data.instances import Region, window
from umae_jax.data.placement import Placement, choose_canvas, fit, keep_ratio_size, oriented

GOLDEN = Path(__file__).parents[1] / "golden_numbers" / "detection"
CANVASES = ((1120, 1600), (1408, 1600), (1600, 1600))
sides = st.integers(1, 3000)


def test_sizes_are_those_of_the_reference():
    with np.load(GOLDEN / "c_losses_resize.npz") as golden:
        rows = golden["resize_wh_scale_newwh"]
    for width, height, long_edge, short_edge, new_width, new_height in rows.tolist():
        assert keep_ratio_size((height, width), short_edge, long_edge) == (new_height, new_width)


@given(sides, sides, st.integers(1, 1600), st.integers(1, 1600))
def test_images_fit_their_canvas(height, width, short_edge, long_edge):
    for canvas in CANVASES:
        size = fit((height, width), short_edge, long_edge, canvas)
        assert 1 <= size[0] <= canvas[0]
        assert 1 <= size[1] <= canvas[1]
        wanted = keep_ratio_size((height, width), short_edge, long_edge)
        assert size == wanted or wanted[0] > canvas[0] or wanted[1] > canvas[1]


@given(sides, sides, st.integers(0, 1000))
def test_an_image_of_its_orientation_needs_no_further_reduction(height, width, number):
    canvas = choose_canvas(0, number, CANVASES, (400, 1400))
    size = oriented(canvas.size, height > width)
    for short_edge in (canvas.low, canvas.high):
        assert fit((height, width), short_edge, 1600, size) == keep_ratio_size((height, width), short_edge, 1600)


def test_canvases_are_drawn_by_their_share_of_the_short_edges():
    drawn = [choose_canvas(3, number, CANVASES, (400, 1400)) for number in range(4000)]
    assert set(drawn) == {((1120, 1600), 400, 1120), ((1408, 1600), 1121, 1400)}
    share = sum(canvas.low == 400 for canvas in drawn) / 4000
    assert share == pytest.approx(721 / 1001, abs=0.03)
    assert drawn[5] == choose_canvas(3, 5, CANVASES, (400, 1400))
    others = [choose_canvas(4, number, CANVASES, (400, 1400)) for number in range(4000)]
    assert drawn != others


def test_a_single_canvas_is_always_drawn():
    counts = collections.Counter(choose_canvas(0, number, ((64, 96),), (20, 64)) for number in range(50))
    assert counts == {((64, 96), 20, 64): 50}


placements = st.builds(
    lambda height, width, scale, share, flip: make_placement(height, width, scale, share, flip),
    *(st.integers(20, 90), st.integers(20, 90), st.floats(0.4, 3), st.floats(0.3, 1), st.booleans()),
)


def make_placement(height, width, scale, share, flip):
    resized = (int(height * scale + 0.5), int(width * scale + 0.5))
    content = (max(1, int(resized[0] * share)), max(1, int(resized[1] * share)))
    offset = ((resized[0] - content[0]) // 2, resized[1] - content[1])
    return Placement((height, width), resized, offset, content, flip)


@given(placements)
def test_boxes_go_to_the_canvas_and_back(placement):
    height, width = placement.content
    boxes = np.array([[0, 0, width, height], [width * 0.2, height * 0.3, width * 0.5, height * 0.9]], np.float32)
    source = placement.to_source(boxes)
    np.testing.assert_allclose(placement.to_content(source), boxes, atol=0.01)
    everything = np.array([[-5, -5, 1000, 1000]], np.float32)
    np.testing.assert_allclose(placement.to_content(everything)[0], [0, 0, width, height])


@given(placements)
def test_masks_go_where_their_boxes_go(placement):
    pixels = np.zeros(placement.source, np.uint8)
    pixels[5:15, 3:18] = 1
    whole = placement.place(Region(pixels, 0, 0))
    part = placement.place(Region(pixels[4:16, 2:20], 2, 4))
    height, width = placement.content
    shown = window(part, 0, 0, width, height)
    np.testing.assert_array_equal(window(whole, 0, 0, width, height), shown)
    box = placement.to_content(np.array([[3, 5, 18, 15]], np.float32))[0]
    if shown.any():
        np.testing.assert_allclose(part.box, box, atol=1.0)
    else:
        assert min(box[2] - box[0], box[3] - box[1]) < 1
