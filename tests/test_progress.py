import io

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, picture
from umae_jax.pictures import COMPLETED, HIDDEN, INPUT, ORIGINAL, Panels, draw, panel
from umae_jax.progress import draw_progress

SIZE = (48, 64)


def reconstruction(step, images=3):
    """Draw a picture in which the prediction is a colour that tells the step."""
    original = np.stack([picture(seed, *SIZE) for seed in range(images)])
    nothing, flags = np.zeros_like(original), np.zeros((images, *SIZE, 1), bool)
    hidden = flags.copy()
    hidden[:, :16, :16] = True
    predicted = np.full_like(original, step)
    return draw(Panels(original, nothing, predicted, predicted, flags | hidden, hidden, np.zeros(images)), ["step"])


def colours(png):
    """Return the colour in the middle of each panel of the first row."""
    with Image.open(io.BytesIO(png)) as strip:
        pixels = np.asarray(strip)
        return [tuple(pixels[80, left + 80]) for left in range(8, strip.width, 168)], strip.size


def test_panels_are_cut_out_where_they_were_drawn():
    with Image.open(io.BytesIO(reconstruction(200))) as sheet:
        for row in range(3):
            original = np.asarray(panel(sheet, SIZE, row, ORIGINAL))
            np.testing.assert_array_equal(original[::4, ::4], picture(row, *SIZE))
            assert (np.asarray(panel(sheet, SIZE, row, INPUT))[:64, :64] == HIDDEN).all()
            assert (np.asarray(panel(sheet, SIZE, row, COMPLETED))[64:] == 200).all()
        with pytest.raises(ValueError, match="has no row 3"):
            panel(sheet, SIZE, 3, ORIGINAL)


def test_shows_the_first_the_last_and_evenly_spaced_steps(tmp_path):
    for step in range(0, 205, 5):
        (tmp_path / f"{step:07}.png").write_bytes(reconstruction(step))
    drawn, size = colours(draw_progress(tmp_path, SIZE, 3))
    assert [red for red, _, _ in drawn[2:]] == [0, 30, 55, 85, 115, 145, 170, 200]
    assert size == (8 + 10 * 168, 8 + 22 + 2 * (120 + 8) + 2 * 22)  # two images


def test_skips_pictures_that_are_missing_damaged_or_of_other_sizes(tmp_path):
    for step in (10, 20, 30, 40):
        (tmp_path / f"{step:07}.png").write_bytes(reconstruction(step, images=1))
    (tmp_path / "0000020.png").write_bytes(b"not a picture")
    (tmp_path / "0000030.png").write_bytes(encode(Image.new("RGB", (20, 20))))
    (tmp_path / "mine.png").write_bytes(reconstruction(50))
    drawn, size = colours(draw_progress(tmp_path, SIZE, 1))
    assert [red for red, _, _ in drawn[2:]] == [10, 40]
    assert size[0] == 8 + 4 * 168


def test_nothing_is_drawn_without_pictures(tmp_path):
    assert draw_progress(tmp_path / "missing", SIZE, 2) is None
    (tmp_path / "0000001.png").write_bytes(b"")
    assert draw_progress(tmp_path, SIZE, 2) is None
