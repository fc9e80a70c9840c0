import io

import numpy as np
import pytest
from PIL import Image

from tests.images import picture
from umae_jax.data import resize as resizing
from umae_jax.data.resize import resize
from umae_jax.data.sources import open_source

SIZE = (96, 128)


def pillow(pixels, box):
    return np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BICUBIC, box)).astype(int)


def boxes(rng, height, width):
    """Crops of every size, some with fractions, and those at the corners and borders."""
    for number in range(8):
        box_width, box_height = rng.uniform(10, width), rng.uniform(10, height)
        left, upper = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
        box = (left, upper, left + box_width, upper + box_height)
        yield box if number % 2 else tuple(map(round, box))
    yield (0, 0, width, height)
    yield (0, 0, 30, 20)
    yield (width - 30, height - 20, width, height)
    yield (width - 47.3, height - 31.9, width, height)


def photographs():
    for record in open_source("photos"):
        yield np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB").resize((411, 333)))


def test_photographs_come_out_as_from_pillow():
    """The same sums, rounded to 8 bits between the two directions in another order: a level apart, hardly ever more."""
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for pixels in photographs():
        for box in boxes(rng, *pixels.shape[:2]):
            ours.append(resize(pixels, box, SIZE).astype(int))
            theirs.append(pillow(pixels, box))
    difference = np.stack(ours) - np.stack(theirs)
    assert np.abs(difference).mean((1, 2, 3)).max() < 0.3  # of 255 levels, in the worst image
    assert np.mean(np.abs(difference) > 1) < 1e-3
    assert np.abs(difference).max() <= 12
    assert abs(difference.mean()) < 0.01  # neither lighter nor darker


def test_one_channel_is_resized_like_three():
    pixels = picture(height=200, width=300)
    gray = resize(np.ascontiguousarray(pixels[..., :1]), (20, 30, 250, 170.5), SIZE)
    assert gray.shape == (*SIZE, 1)
    assert np.abs(gray[..., 0].astype(int) - resize(pixels, (20, 30, 250, 170.5), SIZE)[..., 0]).max() <= 1


def test_what_needs_no_resizing_stays_as_it_is():
    pixels = picture(height=61, width=83)
    np.testing.assert_array_equal(resize(pixels, (0, 0, 83, 61), (61, 83)), pixels)
    np.testing.assert_array_equal(resize(pixels, (3, 5, 43, 35), (30, 40)), pixels[5:35, 3:43])


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_one_colour_stays_that_colour(level):
    pixels = np.full((90, 70, 3), level, np.uint8)
    for size in ((20, 30), (200, 300), (89, 71)):
        assert (resize(pixels, (1.5, 2.5, 69.5, 80.25), size) == level).all()


def test_boxes_reach_to_the_border_whatever_the_rounding():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 60, (300, 2)).tolist():
        pixels = np.zeros((height, width, 3), np.uint8)
        left, upper = rng.uniform(0, width - 0.5), rng.uniform(0, height - 0.5)
        assert resize(pixels, (left, upper, width, height), (5, 7)).shape == (5, 7, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_the_package_pillow_resizes(monkeypatch, channels):
    """Only a neighbourhood of the box is handed over; the pixels are those of resizing from the whole."""
    monkeypatch.setattr(resizing, "cykooz_resizer", None)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, channels), dtype=np.uint8)
    for box in ((0, 0, 150, 120), (40, 30, 100, 110), (40.25, 30.5, 61, 44.75), (149, 1, 150, 3)):
        expected = pillow(pixels if channels == 3 else pixels[..., 0], box).reshape(*SIZE, channels)
        assert np.abs(resize(pixels, box, SIZE) - expected).max() <= 1
