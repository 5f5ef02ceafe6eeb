"""JPEG through simplejpeg (libjpeg-turbo), down to the last row that is needed: Pillow's pixels, sooner.

Both functions return None where Pillow should decide instead: no simplejpeg, not a JPEG, CMYK, no end in sight, more
pixels than Pillow decodes without a warning or at all.
"""

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # optional
    simplejpeg = None

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of baseline, extended and progressive frames
_MARGIN = 2  # the smoothing of colours looks one row ahead


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a JPEG that `decode` can read."""
    # Pillow refuses a file that was cut off, libjpeg fills the rest with grey.
    if simplejpeg is None or not data.startswith(_START) or _END not in data[-64:]:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # A few kilobytes may claim gigabytes of pixels. Pillow has a limit, libjpeg has none.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        return None
    return (width, height) if colors in ("YCbCr", "RGB", "Gray") else None


def decode(data: bytes, height: int, rows: int) -> np.ndarray | None:
    """Decodes at least the first `rows` of the `height` rows of a JPEG whose `size` is known.

    Returns:
      uint8 [H, W, 3], rows <= H <= height; grey is repeated.
    """
    try:
        # strict=False: warnings are no errors, as in Pillow, and skipping rows gives one.
        return simplejpeg.decode_jpeg(_shortened(data, height, rows), strict=False)
    except ValueError:
        return None


def _shortened(data: bytes, height: int, rows: int) -> bytes | bytearray:
    """The same file with a lower height in its header, so that libjpeg stops there; wheels offer no other way."""
    kept = -(-(rows + _MARGIN) // 16) * 16  # whole blocks
    place = _height_place(data)
    if kept >= height or place is None:
        return data
    data = bytearray(data)
    data[place : place + 2] = kept.to_bytes(2, "big")
    return data


def _height_place(data: bytes) -> int | None:
    """Where in the file its height is written."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        if data[place + 1] in _FRAMES:
            return place + 5  # marker, length, bits per sample
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
