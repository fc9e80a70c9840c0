import io
import random

import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageOps

from tests.images import encode, picture
from umae_jax.data.sources import open_source
from umae_jax.data.transforms import EncodedImage, central_crop, load_whole, random_crop


def whole(data, channels=3):
    """Decode without any resizing."""
    image = EncodedImage(data)
    return image.crop((0, 0, *image.size), image.size[::-1], channels)


def test_plain_pixels_come_out_as_they_are():
    pixels = picture()
    np.testing.assert_array_equal(whole(encode(Image.fromarray(pixels))), pixels)
    webp = whole(encode(Image.fromarray(pixels), "WEBP", lossless=True))
    np.testing.assert_array_equal(webp, pixels)


def test_grayscale_palette_and_bilevel_become_colour():
    pixels = picture()
    gray = Image.fromarray(pixels).convert("L")
    np.testing.assert_array_equal(whole(encode(gray)), np.asarray(gray)[..., None].repeat(3, -1))
    palette = Image.fromarray(pixels).quantize(16)
    np.testing.assert_array_equal(whole(encode(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(whole(encode(gray.convert("1"))))) <= {0, 255}


def test_cmyk_is_converted():
    red = Image.new("RGB", (32, 32), (200, 30, 40)).convert("CMYK")
    pixels = whole(encode(red, "JPEG", quality=100))
    assert np.abs(pixels.astype(int).mean((0, 1)) - (200, 30, 40)).max() < 4


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = whole(encode(Image.fromarray(ramp)))
    np.testing.assert_array_equal(pixels, (ramp >> 8).astype(np.uint8)[..., None].repeat(3, -1))


def test_what_is_transparent_shows_white():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (10, 200, 30, 255)  # opaque; below it, black that nobody is meant to see
    out = whole(encode(Image.fromarray(pixels)))
    assert (out[:8] == (10, 200, 30)).all()
    assert (out[8:] == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert (whole(encode(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    upright = Image.fromarray(picture(height=64, width=96))
    transposes = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(transposes[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", quality=95, exif=exif)
    assert EncodedImage(data).size == (96, 64)
    box = (10, 20, 60, 50)
    expected = np.asarray(upright.resize((25, 15), Image.Resampling.BICUBIC, box)).astype(int)
    assert np.abs(EncodedImage(data).crop(box, (15, 25), 3) - expected).mean() < 3


def test_grayscale_models_get_one_channel():
    assert load_whole(encode(Image.fromarray(picture())), (20, 30), 1).shape == (20, 30, 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["plain", "progressive"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_crops_of_photographs_are_those_of_plain_pillow(subsampling, options):
    rng = random.Random(0)
    for record in open_source("photos"):
        photograph = Image.open(io.BytesIO(record.data)).convert("RGB").resize((403, 317))
        data = encode(photograph, "JPEG", quality=rng.randrange(60, 99), subsampling=subsampling, **options)
        for area in (0.05, 0.2, 1.0):
            box = random_crop(rng, *photograph.size, (96, 96), area)
            ours = EncodedImage(data).crop(box, (96, 96), 3).astype(int)
            theirs = Image.open(io.BytesIO(data)).resize((96, 96), Image.Resampling.BICUBIC, box)
            difference = np.abs(ours - np.asarray(theirs))
            assert difference.mean() < 0.3
            assert difference.max() <= 12


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("L", 1)])
def test_pillow_does_not_open_plain_jpegs(monkeypatch, mode, channels):
    data = encode(Image.fromarray(picture()).convert(mode), "JPEG")
    expected = whole(data, channels)

    def opened(_):
        raise AssertionError("opened by Pillow")

    progressive = encode(Image.fromarray(picture()).convert(mode), "JPEG", progressive=True)
    monkeypatch.setattr(Image, "open", opened)
    np.testing.assert_array_equal(whole(data, channels), expected)
    with pytest.raises(AssertionError, match="opened by Pillow"):
        whole(progressive, channels)


def test_more_pixels_than_pillow_opens_are_refused(monkeypatch):
    data = encode(Image.fromarray(picture(height=60, width=80)), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 80 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        whole(data)


def test_colour_becomes_gray_as_with_pillow():
    data = encode(Image.fromarray(picture()), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(whole(data, 1)[..., 0], expected)


def test_a_truncated_jpeg_is_refused_wherever_the_crop_lies():
    data = encode(Image.fromarray(picture(height=300, width=200)), "JPEG", quality=95)
    assert EncodedImage(data).crop((0, 0, 50, 20), (16, 16), 3).shape == (16, 16, 3)
    with pytest.raises(OSError, match="truncated"):
        EncodedImage(data[: len(data) * 3 // 4]).crop((0, 0, 50, 20), (16, 16), 3)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (80, 60))]})]
)
def test_a_large_jpeg_decoded_small_looks_the_same(kind, options, orientation):
    """Decoding at a reduced scale is an approximation: it must stay close to decoding in full."""
    large = Image.fromarray(picture(height=1200, width=1600))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(large, kind, quality=95, exif=exif, **options)
    box = (100, 200, 1100, 1200)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    reference = np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC, box))
    assert np.abs(EncodedImage(data).crop(box, (64, 64), 3).astype(int) - reference).max() <= 4


def test_random_crops_follow_the_recipe():
    rng = random.Random(0)
    width, height = 500, 375
    areas, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = random_crop(rng, width, height, (256, 256), 0.2)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        areas.append((right - left) * (lower - upper) / (width * height))
        ratios.append((right - left) / (lower - upper))
    assert 0.195 < min(areas) < 0.22
    assert max(areas) > 0.95
    assert 0.74 < min(ratios) < 0.77
    assert 1.3 < max(ratios) < 1.35
    # Small crops always fit, so that their area is uniform.
    small = [area for area in areas if area < 0.5]
    assert scipy.stats.kstest(small, scipy.stats.uniform(0.2, 0.3).cdf).pvalue > 1e-4


def test_crops_of_an_output_that_is_not_square_take_its_aspect():
    rng = random.Random(0)
    boxes = [random_crop(rng, 1000, 1000, (64, 128), 0.2) for _ in range(500)]
    ratios = [(right - left) / (lower - upper) for left, upper, right, lower in boxes]
    assert min(ratios) > 2 * 3 / 4 * 0.98
    assert max(ratios) < 2 * 4 / 3 * 1.02
    assert central_crop(100, 100, (64, 128)) == (0, 25, 100, 75)


def test_central_crops_lie_inside_whatever_the_rounding():
    assert min(central_crop(1019, 1319, (224, 224))) >= 0
    sizes = [(width, height) for width in range(1, 400, 3) for height in (1, 7, 101, 399)]
    for width, height in sizes:
        left, upper, right, lower = central_crop(width, height, (224, 160))
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= upper < lower <= height + 1e-9


def test_an_extreme_shape_falls_back_to_the_centre():
    assert random_crop(random.Random(0), 1000, 2, (64, 64), 0.9) == central_crop(1000, 2, (64, 64))
