"""Decodes only the upper part of a JPEG, as far down as a crop reaches.

Most of the time goes into the entropy code, in which no row can be found but by reading all above it. What lies below a
crop need not be read: the same file with a smaller height in its header is a JPEG of its upper part.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

_IN_ORDER = (0xC0, 0xC1)  # start of a frame that is Huffman coded, not progressive
_OTHER_FRAMES = {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC}  # such as progressive
_SCAN = 0xDA
_METADATA = 0xE1  # Exif or XMP
_START = b"\xff\xd8"
_END = b"\xff\xd9"  # never within the entropy code
_BLOCK = 8  # pixels


class Layout(NamedTuple):
    """What matters here of a JPEG's header.

    Attributes:
        height_at: where the file says its height, in two bytes.
        height, width: in pixels, as they are stored.
        components: 1 of a grayscale image, 3 of a colour image.
        unit: rows that are coded together.
        scan_at: where the coded pixels begin.
        metadata: whether there is any that may say which way up the image is.
    """

    height_at: int
    height: int
    width: int
    components: int
    unit: int
    scan_at: int
    metadata: bool


def read_layout(data: bytes) -> Layout | None:
    """The layout of a JPEG whose rows are coded in order, in 8 bits, in 1 or 3 components; None for any other.

    None also for one of more pixels than Pillow opens without a warning.
    """
    at, frame, height, width, unit, components, metadata = 2, 0, 0, 0, 0, 0, False
    if data[:2] != _START:
        return None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, body = data[at + 1], at + 4
        if marker in _IN_ORDER:
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            factors = data[body + 7 : body + 7 + 3 * components : 3]  # a component's samples to either side
            frame, unit = body, _BLOCK * max((factor & 15 for factor in factors), default=0)
            if precision != 8 or components not in (1, 3) or 0 in (height, width, unit):
                return None
            if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
                return None
        elif marker == _SCAN:
            plain = frame and data[body] == components
            return Layout(frame + 1, height, width, components, unit, at, metadata) if plain else None
        elif marker == _METADATA:
            metadata = True
        elif marker in _OTHER_FRAMES:
            return None
        at += 2 + int.from_bytes(data[at + 2 : body])
    return None


def decode_upper(data: bytes, layout: Layout, rows: int, channels: int, shrink: int = 1) -> np.ndarray | None:
    """The upper rows of a JPEG, exactly as Pillow decodes them.

    Args:
        data: the file.
        layout: what `read_layout` says of it.
        rows: wanted, counted from the top before they are shrunk; all where the image has fewer.
        channels: 3; or 1, of a JPEG that is grayscale.
        shrink: both sides by 1, 2, 4 or 8, rounded up.

    Returns:
        uint8 [at least rows / shrink, width / shrink, channels]; None where the file is cut off or damaged:
        Pillow then says what to make of it.
    """
    if data.rfind(_END, layout.scan_at) < 0:
        return None
    # One unit more than wanted, because chroma is interpolated between rows.
    kept = (-(-rows // layout.unit) + 1) * layout.unit
    if kept < layout.height:
        height_at = layout.height_at
        data = b"".join((data[:height_at], kept.to_bytes(2), data[height_at + 2 :]))
    least = -(-min(kept, layout.height) // shrink), -(-layout.width // shrink)
    try:
        # Not strict, like Pillow: what is wrong in the entropy code shows in the pixels.
        return simplejpeg.decode_jpeg(
            data, "RGB" if channels == 3 else "GRAY", min_height=least[0], min_width=least[1], strict=False
        )
    except ValueError:
        return None
