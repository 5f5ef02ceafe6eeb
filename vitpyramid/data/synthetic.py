"""A data set of ImageNet's size without files, for measuring speed: noise with the spectrum of photos, as JPEG."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitpyramid.data.splits import split_ranges

NUM_CLASSES = 1000
SIZES = {"train": 1_281_167, "validation": 50_000}
_DISTINCT = 16  # images
_WIDTH, _HEIGHT = 500, 375
_QUALITY = 92  # with it a file has ImageNet's mean size, 115 kB


@dataclasses.dataclass(frozen=True)
class SyntheticRecords:
    """Example i of a split is image i mod 16 with the label i mod 1000. `records[k]` is the k-th of `indices`."""

    indices: Sequence[int]
    images: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.indices[index]
        return {"image": self.images[number % _DISTINCT], "label": number % NUM_CLASSES}

    def where(self, index: int) -> str:
        """The example, for messages."""
        return f"synthetic image {self.indices[index] % _DISTINCT}"


def open_synthetic(split: str) -> tuple[SyntheticRecords, tuple[str, ...]]:
    """Makes the images of a split; the same ones on every call, 500 x 375 pixels.

    Returns:
      The records, and the names of the classes, which are numbers.

    Raises:
      ValueError: no such split.
    """
    ranges = [positions for _, positions in split_ranges("synthetic", split, SIZES)]
    indices = ranges[0] if len(ranges) == 1 else np.concatenate([np.asarray(r, np.int64) for r in ranges])
    records = SyntheticRecords(indices, tuple(_photo(seed) for seed in range(_DISTINCT)))
    return records, tuple(map(str, range(NUM_CLASSES)))


def _photo(seed: int) -> bytes:
    """A JPEG file whose planes have amplitudes that fall with frequency as those of photos do."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(_HEIGHT)[:, None], np.fft.rfftfreq(_WIDTH)[None])
    frequency[0, 0] = np.inf  # no constant part; it is added below
    planes = []
    for mean, deviation in ((118, 55), (128, 18), (128, 18)):  # Y, Cb, Cr
        spectrum = np.fft.rfft2(rng.standard_normal((_HEIGHT, _WIDTH))) * frequency**-1.15
        plane = np.fft.irfft2(spectrum, s=(_HEIGHT, _WIDTH))
        planes.append(mean + deviation * plane / plane.std())
    pixels = np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(file, "jpeg", quality=_QUALITY)
    return file.getvalue()
