"""EncodedImage, decoding the upper rows of a JPEG, and resizing, against Pillow."""

import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from tests.images import encode, picture
from umae_jax.data import decode
from umae_jax.data.decode import EncodedImage, resize
from umae_jax.data.sources import open_source
from umae_jax.data.transforms import random_crop

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def photograph(height=131, width=97):
    """Return an image so noisy that every block has coefficients."""
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return Image.fromarray((picture(height=height, width=width) + noise).clip(0, 255).astype(np.uint8))


def upper_rows(data, *arguments):
    header = decode.parse_jpeg_header(data)
    return None if header is None else decode.decode_upper_rows(data, header, *arguments)


def pillow_pixels(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 98}, {"restart_marker_rows": 1}], ids=str)
def test_upper_rows_equal_those_of_the_whole_image(subsampling, options):
    data = encode(photograph(), "JPEG", subsampling=subsampling, **options)
    whole = pillow_pixels(data)
    for rows in (1, 8, 16, 17, 64, 100, 130, 131, 500):
        upper = upper_rows(data, rows, 3)
        assert len(upper) == 131 if rows > 120 else rows <= len(upper) < rows + 32
        np.testing.assert_array_equal(upper[:rows], whole[:rows])


def test_grayscale_jpegs_decode_to_one_channel_or_three():
    data = encode(photograph().convert("L"), "JPEG")
    np.testing.assert_array_equal(upper_rows(data, 50, 1)[:50, :, 0], pillow_pixels(data, "L")[:50])
    np.testing.assert_array_equal(upper_rows(data, 50, 3)[:50], pillow_pixels(data)[:50])


def test_progressive_truncated_and_other_files_are_not_decoded_by_rows():
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
        assert upper_rows(other, 50, 3) is None


def test_damaged_files_never_raise():
    data = encode(photograph(), "JPEG", subsampling="4:2:0")
    start = data.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for place in rng.integers(2, start + 10, 3):
            damaged[place] = rng.integers(256)
        upper = upper_rows(bytes(damaged), 40, 3)
        assert upper is None or upper.shape[-1] == 3
    for end in range(start + 20):
        assert upper_rows(data[:end], 40, 3) is None


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_shrinking_decodes_equal_pillows_draft(subsampling, shrink):
    data = encode(photograph(261, 195), "JPEG", subsampling=subsampling)
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // shrink, image.height // shrink))
    whole = np.asarray(image)
    assert whole.shape == (-(-261 // shrink), -(-195 // shrink), 3)
    for rows in (1, 60, 150, 261):
        upper = upper_rows(data, rows, 3, shrink)
        wanted = -(-rows // shrink)
        assert len(upper) < len(whole) or rows == 261
        np.testing.assert_array_equal(upper[:wanted], whole[:wanted])


SIZE = (96, 128)


def pillow_resize(pixels, box):
    return np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BICUBIC, box)).astype(int)


def boxes(rng, height, width):
    """Draw boxes of every size, some with fractions, and add some at corners and borders."""
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


def test_resizing_photographs_matches_pillow():
    """The sums are equal but for rounding between the two directions: pixels differ by one level, rarely by more."""
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for pixels in photographs():
        for box in boxes(rng, *pixels.shape[:2]):
            ours.append(resize(pixels, box, SIZE).astype(int))
            theirs.append(pillow_resize(pixels, box))
    difference = np.stack(ours) - np.stack(theirs)
    assert np.abs(difference).mean((1, 2, 3)).max() < 0.3  # of 255 levels, in the worst image
    assert np.mean(np.abs(difference) > 1) < 1e-3
    assert np.abs(difference).max() <= 12
    assert abs(difference.mean()) < 0.01  # neither lighter nor darker


@pytest.mark.parametrize("size", [(20, 30), (150, 260)])
def test_the_bilinear_filter_is_that_of_pillow(monkeypatch, size):
    pixels, box = picture(height=100, width=140), (3.5, 7.25, 120, 90)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box)).astype(int)
    assert np.abs(resize(pixels, box, size, "bilinear") - expected).max() <= 1
    assert np.abs(resize(pixels, box, size) - expected).max() > 1
    monkeypatch.setattr(decode, "cykooz_resizer", None)
    assert np.abs(resize(pixels, box, size, "bilinear") - expected).max() <= 1


def test_one_channel_resizes_like_three():
    pixels = picture(height=200, width=300)
    gray = resize(np.ascontiguousarray(pixels[..., :1]), (20, 30, 250, 170.5), SIZE)
    assert gray.shape == (*SIZE, 1)
    assert np.abs(gray[..., 0].astype(int) - resize(pixels, (20, 30, 250, 170.5), SIZE)[..., 0]).max() <= 1


def test_a_box_of_the_output_size_is_copied():
    pixels = picture(height=61, width=83)
    np.testing.assert_array_equal(resize(pixels, (0, 0, 83, 61), (61, 83)), pixels)
    np.testing.assert_array_equal(resize(pixels, (3, 5, 43, 35), (30, 40)), pixels[5:35, 3:43])


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_constant_image_stays_constant(level):
    pixels = np.full((90, 70, 3), level, np.uint8)
    for size in ((20, 30), (200, 300), (89, 71)):
        assert (resize(pixels, (1.5, 2.5, 69.5, 80.25), size) == level).all()


def test_boxes_may_end_at_the_border_of_any_image():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 60, (300, 2)).tolist():
        pixels = np.zeros((height, width, 3), np.uint8)
        left, upper = rng.uniform(0, width - 0.5), rng.uniform(0, height - 0.5)
        assert resize(pixels, (left, upper, width, height), (5, 7)).shape == (5, 7, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_resizes_without_cykooz_resizer(monkeypatch, channels):
    """Passing only the pixels around the box to Pillow gives the same output as passing the whole image."""
    monkeypatch.setattr(decode, "cykooz_resizer", None)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 150, channels), dtype=np.uint8)
    for box in ((0, 0, 150, 120), (40, 30, 100, 110), (40.25, 30.5, 61, 44.75), (149, 1, 150, 3)):
        expected = pillow_resize(pixels if channels == 3 else pixels[..., 0], box).reshape(*SIZE, channels)
        assert np.abs(resize(pixels, box, SIZE) - expected).max() <= 1


def whole(data, channels=3):
    """Decode without resizing."""
    image = EncodedImage(data)
    return image.crop((0, 0, *image.size), image.size[::-1], channels)


def test_lossless_files_keep_their_pixels():
    pixels = picture()
    np.testing.assert_array_equal(whole(encode(Image.fromarray(pixels))), pixels)
    webp = whole(encode(Image.fromarray(pixels), "WEBP", lossless=True))
    np.testing.assert_array_equal(webp, pixels)


def test_grayscale_palette_and_bilevel_images_become_rgb():
    pixels = picture()
    gray = Image.fromarray(pixels).convert("L")
    np.testing.assert_array_equal(whole(encode(gray)), np.asarray(gray)[..., None].repeat(3, -1))
    palette = Image.fromarray(pixels).quantize(16)
    np.testing.assert_array_equal(whole(encode(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(whole(encode(gray.convert("1"))))) <= {0, 255}


def test_cmyk_images_become_rgb():
    red = Image.new("RGB", (32, 32), (200, 30, 40)).convert("CMYK")
    pixels = whole(encode(red, "JPEG", quality=100))
    assert np.abs(pixels.astype(int).mean((0, 1)) - (200, 30, 40)).max() < 4


def test_sixteen_bit_values_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = whole(encode(Image.fromarray(ramp)))
    np.testing.assert_array_equal(pixels, (ramp >> 8).astype(np.uint8)[..., None].repeat(3, -1))


def test_transparent_pixels_become_white():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (10, 200, 30, 255)  # opaque; the transparent pixels below are black
    out = whole(encode(Image.fromarray(pixels)))
    assert (out[:8] == (10, 200, 30)).all()
    assert (out[8:] == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert (whole(encode(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_the_pixels_can_be_those_stored(kind, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = picture(height=64, width=96)
    image = EncodedImage(encode(Image.fromarray(pixels), kind, quality=95, exif=exif, **options), exif=False)
    assert image.size == (96, 64)
    assert np.abs(image.crop((0, 0, 96, 64), (64, 96), 3) - pixels.astype(int)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
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


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["plain", "progressive"])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_crops_of_photographs_match_pillow(subsampling, options):
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
def test_sequential_jpegs_bypass_pillow(monkeypatch, mode, channels):
    data = encode(Image.fromarray(picture()).convert(mode), "JPEG")
    expected = whole(data, channels)

    def opened(_):
        raise AssertionError("opened by Pillow")

    progressive = encode(Image.fromarray(picture()).convert(mode), "JPEG", progressive=True)
    monkeypatch.setattr(Image, "open", opened)
    np.testing.assert_array_equal(whole(data, channels), expected)
    with pytest.raises(AssertionError, match="opened by Pillow"):
        whole(progressive, channels)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0MM\0*\0\0\0\b\0\0\0\0\0\0"], ids=["plain", "exif"])
def test_sequential_jpegs_of_any_size_decode_within_the_limit(monkeypatch, exif):
    data = encode(Image.fromarray(picture(height=120, width=160)), "JPEG", quality=95, exif=exif)
    expected = EncodedImage(data).crop((0, 0, 160, 120), (30, 40), 3).astype(int)
    decoded = []
    original = EncodedImage._decode
    monkeypatch.setattr(EncodedImage, "_decode", lambda *args: decoded.append(original(*args)) or decoded[-1])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 160 // 2 - 1)
    assert EncodedImage(data).size == (160, 120)
    assert EncodedImage(data).crop((0, 0, 160, 120), (120, 160), 3).shape == (120, 160, 3)
    small = EncodedImage(data, 120 * 160 // 64).crop((0, 0, 160, 120), (30, 40), 3)
    assert np.abs(small - expected).mean() < 6
    assert [pixels.shape[:2] for pixels in decoded] == [(60, 80), (15, 20)]
    with pytest.raises(Image.DecompressionBombError, match=r"300 pixels exceed .* 299; raise data\.max_pixels"):
        EncodedImage(data, 299).crop((0, 0, 160, 120), (30, 40), 3)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {}), ("TIFF", {}), ("JPEG", {"progressive": True})]
)
def test_more_pixels_than_the_limit_raise(monkeypatch, kind, options):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 80)
    data = encode(Image.fromarray(picture(height=60, width=80)), kind, progressive=True)
    with pytest.raises(Image.DecompressionBombError, match=r"4,800 pixels exceed .*data\.max_pixels"):
        EncodedImage(data, 4799)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 80 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError, match=r"data\.max_pixels"):
        EncodedImage(data)
    assert EncodedImage(data, 4800).crop((0, 0, 80, 60), (60, 80), 3).shape == (60, 80, 3)


def test_formats_that_run_programs_are_not_read_under_any_name():
    for kind in ("EPS", "PDF"):
        with pytest.raises(UnidentifiedImageError):
            EncodedImage(encode(Image.fromarray(picture()), kind))


def test_colour_jpegs_become_gray_as_in_pillow():
    data = encode(Image.fromarray(picture()), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    np.testing.assert_array_equal(whole(data, 1)[..., 0], expected)


def test_truncated_jpegs_raise_for_every_crop():
    data = encode(Image.fromarray(picture(height=300, width=200)), "JPEG", quality=95)
    assert EncodedImage(data).crop((0, 0, 50, 20), (16, 16), 3).shape == (16, 16, 3)
    with pytest.raises(OSError, match="truncated"):
        EncodedImage(data[: len(data) * 3 // 4]).crop((0, 0, 50, 20), (16, 16), 3)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (80, 60))]})]
)
def test_shrunk_decoding_is_close_to_full_decoding(kind, options, orientation):
    large = Image.fromarray(picture(height=1200, width=1600))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(large, kind, quality=95, exif=exif, **options)
    box = (100, 200, 1100, 1200)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    reference = np.asarray(upright.resize((64, 64), Image.Resampling.BICUBIC, box))
    assert np.abs(EncodedImage(data).crop(box, (64, 64), 3).astype(int) - reference).max() <= 4


def as_pillow_turns(data):
    """Return the pixels that Pillow reads: turned by `exif_transpose`, or not turned where that fails."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    except Exception:
        image = Image.open(io.BytesIO(data))
    return np.asarray(image.convert("RGB"))


def assert_read_as_by_pillow(data):
    try:
        expected = as_pillow_turns(data)
    except Exception:  # not even Pillow can read it
        return
    pixels = whole(data)
    assert pixels.shape == expected.shape
    np.testing.assert_array_equal(pixels, expected)


TAGS = st.sampled_from([0x0112, 0x010F, 0x0131, 0x0132, 0x011A, 0x8769, 0x8825, 0xA005, 0x9286, 0x0103])
ENTRIES = st.lists(
    st.tuples(
        TAGS | st.integers(0, 65535),
        st.integers(0, 14),  # data type: 1..12 are valid
        st.sampled_from([0, 1, 2, 3, 1000, 2**32 - 1]) | st.integers(0, 8),  # number of values
        st.sampled_from([bytes((0, n, 0, 0)) for n in range(12)] + [b"\xff" * 4]) | st.binary(min_size=4, max_size=4),
    ),
    max_size=5,
)


def exif_block(entries, tail):
    """Return big-endian Exif data of one directory."""
    directory = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + directory + bytes(4) + tail


@settings(max_examples=150, deadline=None, derandomize=True)
@given(entries=ENTRIES, tail=st.binary(max_size=40), end=st.none() | st.integers(0, 60))
@pytest.mark.filterwarnings("ignore")  # Pillow's, of broken metadata
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_never_make_an_image_unreadable(kind, entries, tail, end):
    exif = exif_block(entries, tail)[:end]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    assert_read_as_by_pillow(encode(Image.fromarray(picture(height=24, width=40)), kind, exif=exif, **options))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(entries=ENTRIES, tail=st.binary(max_size=40))
@pytest.mark.filterwarnings("ignore")
def test_tags_never_make_a_tiff_unreadable(entries, tail):
    data = encode(Image.fromarray(picture(height=24, width=40)), "TIFF")
    offset = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[offset : offset + 2], "little")
    directory = data[offset + 2 : offset + 2 + 12 * count]
    added = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    end = len(data).to_bytes(4, "little")
    directory = struct.pack("<H", count + len(entries)) + directory + added + bytes(4) + tail
    assert_read_as_by_pillow(data[:4] + end + data[8:] + directory)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", [*range(-1, 11), 65535, 6.0, "6", b"\6", (6, 6), (1, 0), 2**31])
@pytest.mark.filterwarnings("ignore")
def test_orientations_of_any_type_are_those_of_pillow(kind, value):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x0112] = {int: 4, float: 12, str: 2, bytes: 7, tuple: 3}[type(value)] if value != -1 else 9
    tags[0x0112] = value
    exif = io.BytesIO(b"II*\0\b\0\0\0" + tags.tobytes(8)).getvalue()
    image = Image.fromarray(picture(height=24, width=40))
    options = {"tiffinfo": tags} if kind == "TIFF" else {"exif": b"Exif\0\0" + exif, "lossless": True}
    data = encode(image, kind, **options)
    assert_read_as_by_pillow(data)
    assert EncodedImage(data).size == as_pillow_turns(data).shape[1::-1]
