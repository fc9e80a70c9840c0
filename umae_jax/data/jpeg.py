"""Decodes only the upper part of a JPEG, as far down as a crop reaches.

Most of the time goes into the entropy code, in which no row can be found but by reading all above it. What lies below a
crop need not be read: the same file with a smaller height in its header is a JPEG of its upper part.
"""

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

_IN_ORDER = (0xC0, 0xC1)  # start of a frame that is Huffman coded, not progressive
_OTHER_FRAMES = {*range(0xC2, 0xD0)} - {0xC4, 0xC8, 0xCC}  # such as progressive
_SCAN = 0xDA
_END = b"\xff\xd9"  # never within the entropy code
_BLOCK = 8  # pixels


class _Layout(NamedTuple):
    """Where a JPEG's header says its height, and what else of it matters here."""

    height_at: int  # two bytes
    height: int
    width: int
    unit: int  # rows that are coded together
    scan_at: int


def _layout(data: bytes) -> _Layout | None:
    """The layout of a JPEG whose rows are coded in order, in 8 bits; None for any other."""
    at, frame, height, width, unit, components = 2, 0, 0, 0, 0, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, body = data[at + 1], at + 4
        if marker in _IN_ORDER:
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            factors = data[body + 7 : body + 7 + 3 * components : 3]  # a component's samples to either side
            frame, unit = body, _BLOCK * max((factor & 15 for factor in factors), default=0)
            if precision != 8 or 0 in (height, width, unit):
                return None
        elif marker == _SCAN:
            return _Layout(frame + 1, height, width, unit, at) if frame and data[body] == components else None
        elif marker in _OTHER_FRAMES:
            return None
        at += 2 + int.from_bytes(data[at + 2 : body])
    return None


def decode_upper(data: bytes, rows: int, channels: int, shrink: int = 1) -> np.ndarray | None:
    """The upper rows of a JPEG, exactly as Pillow decodes them.

    Args:
        data: the file.
        rows: wanted, counted from the top before they are shrunk; all where the image has fewer.
        channels: 3; or 1, of a JPEG that is grayscale.
        shrink: both sides by 1, 2, 4 or 8, rounded up.

    Returns:
        uint8 [at least rows / shrink, width / shrink, channels]; None where the file is progressive, cut off or
        otherwise not plain: Pillow then says what to make of it.
    """
    layout = _layout(data)
    if layout is None or data.rfind(_END, layout.scan_at) < 0:
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
