"""OpenCV's bilinear resize, in which the published detectors see their images: two taps a side, no antialiasing."""

import numpy as np

_BITS = 11  # of a weight


def resize_linear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The levels of `cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)`.

    Follows `modules/imgproc/src/resize.cpp`: weights of 11 bits, and sums rounded as there. Exactly half the size is
    the mean of four pixels.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) of the result.
    """
    height, width, bands = image.shape
    if (height, width) == (2 * size[0], 2 * size[1]):
        total = image.reshape(size[0], 2, size[1], 2, bands).astype(np.uint16).sum(axis=(1, 3))
        return ((total + 2) >> 2).astype(np.uint8)
    left, across = _taps(width, size[1])
    # Beyond the edges one pixel has all the weight. Down, it is mixed with itself instead, which may take a level off.
    across[:, (left < 0) | (left >= width - 1)] = [[1 << _BITS], [0]]
    across = np.repeat(across, bands, axis=1)
    pixels = image.reshape(height, width * bands)
    mixed = np.zeros((height, size[1] * bands), np.int32)
    for neighbour, weights in enumerate(across):
        columns = np.clip(left + neighbour, 0, width - 1)[:, None] * bands + np.arange(bands)
        mixed += np.take(pixels, columns.ravel(), axis=1) * weights
    mixed >>= 4
    out = np.full((size[0], size[1] * bands), 2, np.int32)
    top, down = _taps(height, size[0])
    for neighbour, weights in enumerate(down):
        part = mixed[np.clip(top + neighbour, 0, height - 1)]
        part *= weights[:, None]
        part >>= 16
        out += part
    out >>= 2
    return out.astype(np.uint8).reshape(*size, bands)


def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first old pixel of each new one, from -1 on, and the weights of it and the next one, int32 [2, new_size]."""
    scale = 1.0 / (new_size / size)
    place = ((np.arange(new_size) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    weights = np.stack([1 - share, share]) * np.float32(1 << _BITS)
    return first, np.rint(weights).astype(np.int32)
