"""Image formats: all that Pillow reads by itself as one image, so one more plugin of Pillow is one more format."""

import functools

from PIL import Image

# Formats of Pillow that are never read.
EXCLUDED = {
    "EPS": "runs Ghostscript",
    "WMF": "is drawn by Windows alone",
    "BUFR": "needs a handler",
    "GRIB": "needs a handler",
    "HDF5": "needs a handler",
    "IPTC": "contains a file of any format",
    "FLI": "is an animation",
    "MPEG": "is a video",
    "PDF": "is a document",
}


@functools.cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read, in the order in which Pillow tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in EXCLUDED)


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that are read, such as "jpg"; an MPO begins with a JPEG, which is read."""
    read = {*formats(), "MPO"}
    return frozenset(suffix[1:] for suffix, name in Image.registered_extensions().items() if name in read)


def has_image_suffix(name: str) -> bool:
    """Return whether a file's name ends in the suffix of a format that is read."""
    return name.rpartition(".")[2].lower() in suffixes()
