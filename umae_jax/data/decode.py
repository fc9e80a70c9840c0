"""Decode one crop of an image file and resize it to uint8 pixels. Does not import JAX.

Most of a JPEG's decoding time is entropy decoding. It is sequential: a row needs every row above it, but none below.
The same file with a smaller height in its header is a JPEG of its upper rows, so nothing below a crop is decoded.
"""

import io
import math
import struct
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from umae_jax.data.formats import formats

try:
    import cykooz_resizer  # resizes with SIMD instructions
except ImportError:  # no wheel for this platform; Pillow resizes instead
    cykooz_resizer = None

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
Filter = Literal["bicubic", "bilinear"]  # both antialias when they reduce an image

# JPEG decoders can halve the sides cheaply; keep at least this many decoded pixels per output pixel along each side.
SHRINK_MARGIN = 2.0

_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # start-of-frame markers: Huffman coded, not progressive
_OTHER_FRAMES = {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_APP1 = 0xE1  # Exif or XMP
_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"  # never occurs inside entropy-coded data
_BICUBIC_SUPPORT = 2  # pixels of the coarser image, on each side


class EncodedImage:
    """An image file, given its contents; `crop` decodes the pixels. Raises an exception if it is not an image.

    Broken metadata never raise: the pixels are then not turned.

    Args:
        data: contents of the file.
        max_pixels: maximum number of pixels to decode. A sequential JPEG with more is decoded at a lower resolution,
            any other image raises DecompressionBombError. None: Pillow's limit.
        exif: apply the Exif orientation; False for the pixels as stored, to which annotations refer;
            Pillow turns a TIFF in any case.

    Attributes:
        size: width and height in pixels, after the Exif orientation is applied.
    """

    def __init__(self, data: bytes, max_pixels: int | None = None, *, exif: bool = True) -> None:
        self._data, self._max_pixels, self._exif = data, _pixel_limit(max_pixels), exif
        self._jpeg = parse_jpeg_header(data)
        self._orientation = 1
        if self._jpeg is not None and not (exif and self._jpeg.has_metadata):  # most files, without opening them
            self.size = (self._jpeg.width, self._jpeg.height)
            return
        image = self._image
        if exif and isinstance(image, JpegImageFile):
            self._orientation = _orientation(image.info)
        width, height = image.size
        self.size = (height, width) if self._orientation >= 5 else (width, height)

    @cached_property
    def _image(self) -> Image.Image:
        """The opened image: a JPEG not yet loaded, because it may be decoded at a lower resolution."""
        image = self._open()
        if isinstance(image, JpegImageFile) or not self._exif:
            return image
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # broken metadata; broken pixels raise again
            image = self._open()
            image.load()
        return image

    def _open(self) -> Image.Image:
        if self._jpeg is not None:
            return JpegImageFile(io.BytesIO(self._data))  # without Pillow's limit of pixels
        try:
            file = io.BytesIO(self._data)
            image = Image.open(file) if self._data[:2] == _START_OF_IMAGE else Image.open(file, formats=formats())
        except Image.DecompressionBombError as error:
            raise Image.DecompressionBombError(f"{error} Raise data.max_pixels to read it.") from None
        self._check_pixels(image.width * image.height)
        return image

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self._max_pixels:
            message = f"its {pixels:,} pixels exceed the limit of {self._max_pixels:,}; raise data.max_pixels"
            raise Image.DecompressionBombError(message)

    def crop(self, box: Box, size: tuple[int, int], channels: int, kind: Filter = "bicubic") -> np.ndarray:
        """Decode the pixels of a box and resize them, antialiased: uint8 [*size, channels].

        Args:
            box: in pixels, after the Exif orientation is applied.
            size: height and width of the output.
            channels: 3 for RGB, 1 for grayscale.
            kind: filter that resizes.
        """
        width, height = box[2] - box[0], box[3] - box[1]
        max_shrink = min(width / size[1], height / size[0]) / SHRINK_MARGIN
        is_jpeg = self._jpeg is not None or isinstance(self._image, JpegImageFile)
        shrink = next((factor for factor in (8, 4, 2) if factor <= max_shrink), 1) if is_jpeg else 1
        if self._jpeg is not None:
            count = self._jpeg.width * self._jpeg.height
            while shrink < 8 and count > self._max_pixels * shrink**2:
                shrink *= 2
            self._check_pixels(count // shrink**2)
        rows = math.ceil(box[3]) + shrink * _support(height / shrink, size[0])
        pixels = self._decode(rows, channels, shrink)
        shrunk = tuple(-(-side // shrink) for side in self.size)  # decoders round up
        scale_x, scale_y = shrunk[0] / self.size[0], shrunk[1] / self.size[1]
        right, lower = min(box[2] * scale_x, shrunk[0]), min(box[3] * scale_y, shrunk[1])
        return resize(pixels, (box[0] * scale_x, box[1] * scale_y, right, lower), size, kind)

    def _decode(self, rows: int, channels: int, shrink: int) -> np.ndarray:
        """Decode at least the upper `rows`, counted before shrinking: uint8 [rows or more, width, channels]."""
        if self._jpeg is not None and self._orientation <= 1 and self._jpeg.components in (1, channels):
            pixels = decode_upper_rows(self._data, self._jpeg, rows, channels, shrink)
            if pixels is not None:
                return pixels
        image = self._image
        if isinstance(image, JpegImageFile):
            image.draft(None, (image.width // shrink, image.height // shrink))
        return to_pixels(image, channels, exif=self._exif)


def to_pixels(image: Image.Image, channels: int, *, exif: bool = True) -> np.ndarray:
    """Return the pixels of an image, uint8 [height, width, 3 or 1], turned as its Exif orientation says if `exif`."""
    if exif and _orientation(image.info) > 1:
        image = ImageOps.exif_transpose(image)
    return np.atleast_3d(np.asarray(_convert(image, "RGB" if channels == 3 else "L")))


def _pixel_limit(max_pixels: int | None) -> float:
    """Return the maximum number of pixels to decode, and raise Pillow's own limit to it."""
    pillows = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf  # Pillow warns of half as many
    if max_pixels is None:
        return pillows
    if max_pixels > pillows:
        Image.MAX_IMAGE_PIXELS = max_pixels
    return max_pixels


def _orientation(info: dict[str | tuple[int, int], Any]) -> int:
    """Return the Exif orientation that Pillow's `exif_transpose` applies, given an image's `info`; 1 if it fails."""
    pixel = Image.new("L", (1, 1))
    pixel.info = info.copy()
    try:
        orientation = pixel.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in range(2, 9):
            return 1
        ImageOps.exif_transpose(pixel, in_place=True)
    except Exception:
        return 1
    return int(orientation)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert any image to 8-bit "RGB" or "L"; scale 16 bits to 8, and blend transparent pixels with white."""
    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would clip it
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


class JpegHeader(NamedTuple):
    """The fields of a JPEG's header that decoding its upper rows needs."""

    height_offset: int  # position of the 2-byte height in the file
    height: int  # in pixels, as stored
    width: int
    components: int  # 1 for grayscale, 3 for colour
    unit_rows: int  # rows per minimum coded unit
    scan_offset: int  # position of the start-of-scan marker
    has_metadata: bool  # has an APP1 segment, which may hold an Exif orientation


def parse_jpeg_header(data: bytes) -> JpegHeader | None:
    """Parse the header of a sequential 8-bit JPEG with 1 or 3 components in one scan; None for other files."""
    if data[:2] != _START_OF_IMAGE:
        return None
    frame: tuple[int, int, int, int, int] | None = None
    offset, has_metadata = 2, False
    while offset + 10 <= len(data) and data[offset] == 0xFF:
        marker, body = data[offset + 1], offset + 4
        if marker in _SEQUENTIAL_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            sampling_factors = data[body + 7 : body + 7 + 3 * components : 3]  # one byte per component: 4 bits per axis
            unit_rows = 8 * max((factor & 15 for factor in sampling_factors), default=0)
            if precision != 8 or components not in (1, 3) or 0 in (height, width, unit_rows):
                return None
            frame = (body + 1, height, width, components, unit_rows)
        elif marker == _START_OF_SCAN:
            if frame is None or data[body] != frame[3]:  # not all components
                return None
            return JpegHeader(*frame, offset, has_metadata)
        elif marker in _OTHER_FRAMES:
            return None
        has_metadata = has_metadata or marker == _APP1
        offset += 2 + int.from_bytes(data[offset + 2 : body])
    return None


def decode_upper_rows(data: bytes, header: JpegHeader, rows: int, channels: int, shrink: int = 1) -> np.ndarray | None:
    """Decode the upper rows of a JPEG to the same pixels as Pillow.

    Args:
        header: that of `data`.
        rows: minimum number of rows to decode, counted before shrinking.
        channels: 3, or 1 for a grayscale JPEG.
        shrink: divides both sides, rounded up: 1, 2, 4 or 8.

    Returns:
        uint8 [rows / shrink or more, width / shrink, channels]; None if the file is truncated or cannot be decoded.
    """
    if data.rfind(_END_OF_IMAGE, header.scan_offset) < 0:
        return None
    kept = (-(-rows // header.unit_rows) + 1) * header.unit_rows  # one unit more: chroma is interpolated between rows
    if kept < header.height:
        data = b"".join((data[: header.height_offset], kept.to_bytes(2), data[header.height_offset + 2 :]))
    min_height, min_width = -(-min(kept, header.height) // shrink), -(-header.width // shrink)
    mode = "RGB" if channels == 3 else "GRAY"
    try:  # not strict, like Pillow: errors in the entropy-coded data show in the pixels
        return simplejpeg.decode_jpeg(data, mode, min_height=min_height, min_width=min_width, strict=False)
    except ValueError:
        return None


def _support(box_side: float, output_side: int) -> int:
    """Return the maximum number of pixels that the bicubic filter reads beyond each end of a box's side."""
    return math.ceil(_BICUBIC_SUPPORT * max(1.0, box_side / output_side)) + 1


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int], kind: Filter = "bicubic") -> np.ndarray:
    """Resize a box of an image, uint8 [height, width, 3 or 1] -> [*size, 3 or 1], like Pillow's `resize`.

    Both libraries resize one axis after the other, in opposite order, and round to 8 bits in between. On average their
    results differ by 0.16 of 255 levels, and each differs by 0.30 levels from the exact result.

    Args:
        box: inside the image; the filter also reads pixels around it.
        size: height and width of the output.
        kind: filter.
    """
    (left, upper, right, lower), channels = box, pixels.shape[-1]
    # Copy only the pixels that the output depends on.
    support_x, support_y = _support(right - left, size[1]), _support(lower - upper, size[0])
    first, top = max(0, math.floor(left) - support_x), max(0, math.floor(upper) - support_y)
    pixels = pixels[top : math.ceil(lower) + support_y, first : math.ceil(right) + support_x]
    left, right, upper, lower = left - first, right - first, upper - top, lower - top
    if cykooz_resizer is None:
        image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        image = image.resize(size[::-1], Image.Resampling[kind.upper()], (left, upper, right, lower))
        return np.atleast_3d(np.asarray(image))
    pixel_type = cykooz_resizer.PixelType.U8x3 if channels == 3 else cykooz_resizer.PixelType.U8
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], pixel_type, pixels.tobytes())
    target = cykooz_resizer.ImageData(size[1], size[0], pixel_type)
    types = cykooz_resizer.FilterType
    algorithm = cykooz_resizer.ResizeAlg.convolution(
        types.bilinear if kind == "bilinear" else types.catmull_rom  # a = -0.5, as in Pillow
    )
    crop_box = cykooz_resizer.CropBox(left, upper, right - left, lower - upper)
    options = cykooz_resizer.ResizeOptions(resize_alg=algorithm, crop_box=crop_box)
    cykooz_resizer.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, channels)
