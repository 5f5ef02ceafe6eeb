"""vitpyramid.data.photos."""

import numpy as np
from PIL import Image

from vitpyramid.data.photos import PHOTOS, photograph, write_photos


def test_pieces_of_photographs(tmp_path):
    folder = write_photos(tmp_path)
    for split, count in (("train", 64), ("test", 16)):
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(PHOTOS)
        assert {len(list(path.iterdir())) for path in (folder / split).iterdir()} == {count}
    photo = photograph("temple")
    assert min(photo.shape[:2]) == 128 and np.array_equal(photo, np.asarray(Image.open(folder / "temple.png")))
    windows = np.lib.stride_tricks.sliding_window_view(photo, (32, 32), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    for split in ("train", "test"):
        piece = np.asarray(Image.open(folder / split / "temple" / "0.png"))
        (place,) = np.argwhere((windows == piece).all((2, 3, 4)))
        third = photo.shape[1] * 2 // 3
        assert place[1] + 32 <= third if split == "train" else place[1] >= third
    first = (folder / "train" / "cat" / "0.png").read_bytes()
    write_photos(tmp_path / "again")
    assert (tmp_path / "again" / "train" / "cat" / "0.png").read_bytes() == first
