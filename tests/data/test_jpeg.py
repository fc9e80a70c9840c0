import io

import numpy as np
import pytest
from PIL import Image

from tests.images import encode, picture
from umae_jax.data import jpeg

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def photograph(height=131, width=97):
    """Noisy enough that every block is coded."""
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return Image.fromarray((picture(height=height, width=width) + noise).clip(0, 255).astype(np.uint8))


def decode_upper(data, *arguments):
    layout = jpeg.read_layout(data)
    return None if layout is None else jpeg.decode_upper(data, layout, *arguments)


def decode(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 98}, {"restart_marker_rows": 1}], ids=str)
def test_the_upper_rows_are_those_of_the_whole(subsampling, options):
    data = encode(photograph(), "JPEG", subsampling=subsampling, **options)
    whole = decode(data)
    for rows in (1, 8, 16, 17, 64, 100, 130, 131, 500):
        upper = decode_upper(data, rows, 3)
        assert len(upper) == 131 if rows > 120 else rows <= len(upper) < rows + 32
        np.testing.assert_array_equal(upper[:rows], whole[:rows])


def test_grayscale_is_decoded_to_one_channel_or_three():
    data = encode(photograph().convert("L"), "JPEG")
    np.testing.assert_array_equal(decode_upper(data, 50, 1)[:50, :, 0], decode(data, "L")[:50])
    np.testing.assert_array_equal(decode_upper(data, 50, 3)[:50], decode(data)[:50])


def test_what_is_not_plain_is_left_to_pillow():
    image = photograph()
    data = encode(image, "JPEG")
    for other in (
        encode(image, "JPEG", progressive=True),
        encode(image, "PNG"),
        data[:-2],  # without its end
        data[: len(data) // 2],
        data[:200],
        b"",
    ):
        assert decode_upper(other, 50, 3) is None


def test_no_damage_raises():
    data = encode(photograph(), "JPEG", subsampling="4:2:0")
    start = data.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for place in rng.integers(2, start + 10, 3):
            damaged[place] = rng.integers(256)
        upper = decode_upper(bytes(damaged), 40, 3)
        assert upper is None or upper.shape[-1] == 3
    for end in range(start + 20):
        assert decode_upper(data[:end], 40, 3) is None


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_the_decoder_shrinks_as_pillows_does(subsampling, shrink):
    data = encode(photograph(261, 195), "JPEG", subsampling=subsampling)
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // shrink, image.height // shrink))
    whole = np.asarray(image)
    assert whole.shape == (-(-261 // shrink), -(-195 // shrink), 3)
    for rows in (1, 60, 150, 261):
        upper = decode_upper(data, rows, 3, shrink)
        wanted = -(-rows // shrink)
        assert len(upper) < len(whole) or rows == 261
        np.testing.assert_array_equal(upper[:wanted], whole[:wanted])
