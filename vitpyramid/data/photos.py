"""Ten photographs that come with scikit-learn and scikit-image, cut into a small data set: nothing to download.

A class is a photograph, an image a piece of it: those of "train" from its left two thirds, those of "test" from the
right third, so that a network which is right has learned what goes through the whole picture.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128  # shorter side of a photograph, in pixels
PIECE = 32  # side of a piece
_PIECES = {"train": 64, "test": 16}  # of each photograph
# By what they show; scikit-learn's temple (china.jpg) and flower, else the names of scikit-image's own.
PHOTOS = {
    "astronaut": "astronaut",
    "bricks": "brick",
    "cat": "chelsea",
    "coffee": "coffee",
    "flower": None,
    "grass": "grass",
    "moon": "moon",
    "retina": "retina",
    "rocket": "rocket",
    "temple": None,
}


def photograph(name: str) -> np.ndarray:
    """One of `PHOTOS`, its shorter side `SIDE` pixels: uint8 `[H, W, 3]`.

    Raises:
      ImportError: scikit-image is not installed.
    """
    if name in ("flower", "temple"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image("china.jpg" if name == "temple" else "flower.jpg")
    else:
        try:
            from skimage import data
        except ImportError as error:
            raise ImportError("the photographs need scikit-image: pip install scikit-image") from error
        pixels = getattr(data, PHOTOS[name])()
    photo = Image.fromarray(pixels).convert("RGB")
    scale = SIDE / min(photo.size)
    return np.asarray(photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS))


def write_photos(folder: str | Path) -> Path:
    """Writes `FOLDER/SPLIT/CLASS/N.png`, 640 images of "train", 160 of "test", and the photographs `FOLDER/CLASS.png`.

    The same bytes each time; a folder that is there is left as it is.

    Returns:
      The folder.

    Raises:
      ImportError: scikit-image is not installed.
    """
    folder = Path(folder)
    for place, name in enumerate(PHOTOS):
        if (folder / f"{name}.png").exists():
            continue
        photo, rng = photograph(name), np.random.default_rng(place)
        height, width = photo.shape[:2]
        third = width * 2 // 3
        for split, (low, high) in {"train": (0, third), "test": (third, width)}.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(_PIECES[split]):
                top, left = rng.integers(height - PIECE + 1), rng.integers(low, high - PIECE + 1)
                piece = Image.fromarray(photo[top : top + PIECE, left : left + PIECE])
                piece.save(folder / split / name / f"{i}.png")
        Image.fromarray(photo).save(folder / f"{name}.png")  # last: what is there is whole
    return folder
