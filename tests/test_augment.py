"""vitpyramid.data.augment against torchvision's formulas and an independent bicubic resize."""

import io
import math
import warnings

import numpy as np
import pytest
import skimage.data
from PIL import Image

from vitpyramid.data import augment


def encoded(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# Decoding


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "P with transparency", "I;16"])
def test_decode_to_rgb(mode):
    photo = Image.fromarray(skimage.data.astronaut()[:40, :30])
    if mode.startswith("P"):
        image = photo.quantize(16)
        expected = np.array(image.getpalette()).reshape(-1, 3)[np.asarray(image)]
        image.info |= {"transparency": bytes(range(16))} if mode != "P" else {}
    elif mode == "I;16":
        grey = np.asarray(photo.convert("L")).astype(np.uint16)
        image, expected = Image.fromarray(grey * 256 + 255), np.stack([grey] * 3, -1)
    else:
        image = photo.convert("L" if mode == "LA" else mode)
        expected = np.asarray(image.convert("L") if mode in ("L", "1", "LA") else photo)
        expected = expected if expected.ndim == 3 else np.stack([expected] * 3, -1)
        if mode in ("LA", "RGBA"):
            image.putalpha(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = augment.decode(encoded(image))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_decode_cmyk_jpeg():
    photo = Image.fromarray(skimage.data.astronaut()[:64, :64])
    data = encoded(photo.convert("CMYK"), "jpeg")
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    difference = np.asarray(augment.decode(data)).astype(int) - np.asarray(photo)
    assert np.abs(difference).mean() < 8  # JPEG's loss; an inverted image is off by more than 60


@pytest.mark.parametrize("cut", [0, 1, 30, 200])
def test_decode_refuses_damage(cut):
    data = encoded(Image.fromarray(skimage.data.astronaut()[:40, :30]), "jpeg")
    with pytest.raises(ValueError, match="not a readable image"):
        augment.decode(data[:cut])


# Crops


class Scripted:
    """A stand-in for np.random.Generator that yields chosen fractions of each range."""

    def __init__(self, *fractions):
        self.fractions = list(fractions)

    def uniform(self, low, high):
        return low + self.fractions.pop(0) * (high - low)

    def integers(self, high):
        return int(self.fractions.pop(0) * high)


def test_random_crop_box_by_hand():
    # area .25 * 400 * 300 = 30000, aspect 4/3: 200 x 150; 151 places down, 201 across
    assert augment.random_crop_box(400, 300, (0.25, 1), (3 / 4, 4 / 3), Scripted(0, 1, 0, 0)) == (0, 0, 200, 150)
    assert augment.random_crop_box(400, 300, (0.25, 1), (3 / 4, 4 / 3), Scripted(0, 1, 0.999, 0.5)) == (
        100,
        150,
        300,
        300,
    )
    # log-uniform: the middle of [1/4, 4] is a square, not 2.125
    assert augment.random_crop_box(400, 300, (0.25, 0.75), (1 / 4, 4), Scripted(0, 0.5, 0, 0)) == (0, 0, 173, 173)
    # the whole area at 3/4 does not fit, the second draw does
    assert augment.random_crop_box(400, 300, (0.5, 1), (3 / 4, 4 / 3), Scripted(1, 0, 1, 1, 0, 0)) == (0, 0, 400, 300)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 30, (480, 0, 520, 30)), (30, 1000, (0, 480, 30, 520)), (41, 7, (16, 0, 25, 7)), (40, 40, (0, 0, 40, 40))],
)
def test_random_crop_falls_back_to_the_centre(width, height, box):
    rejected = Scripted(*[1, 0, 1, 1] * 5)  # ten times the full area, or more, at an extreme aspect
    assert augment.random_crop_box(width, height, (1.5, 2.0), (3 / 4, 4 / 3), rejected) == box
    assert rejected.fractions == []


def test_random_crop_statistics():
    rng, scale, ratio = np.random.default_rng(0), (0.08, 0.5), (3 / 4, 4 / 3)
    boxes = np.array([augment.random_crop_box(4000, 4000, scale, ratio, rng) for _ in range(4000)])
    size = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 4000
    area = (size.prod(1) / 4000**2 - scale[0]) / (scale[1] - scale[0])
    aspect = np.log(size[:, 0] / size[:, 1]) / math.log(4 / 3) / 2 + 0.5
    place = boxes[:, :2] / (4000 - size)
    for sample in area, aspect, place[:, 0], place[:, 1]:  # each uniform on [0, 1]: Kolmogorov-Smirnov at 4000 draws
        assert np.abs(np.sort(sample) - np.linspace(0, 1, 4000)).max() < 0.03


def bicubic(array, height, width):
    """Antialiased bicubic (a = -.5) resize as two float matrices: Pillow's filter, written from its definition."""

    def matrix(source, target):
        factor = max(source / target, 1)
        x = (np.arange(target)[:, None] + 0.5) * (source / target) - 0.5 - np.arange(source)[None, :]
        x = np.abs(x / factor)
        weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        return weights / weights.sum(1, keepdims=True)

    # Pillow goes across first and rounds to bytes in between
    across = np.clip(np.rint(np.einsum("ow,hwc->hoc", matrix(array.shape[1], width), array)), 0, 255)
    return np.clip(np.rint(np.einsum("oh,hwc->owc", matrix(array.shape[0], height), across)), 0, 255)


def assert_close_pixels(image, expected):
    assert image.shape == expected.shape
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01  # Pillow's fixed-point weights


@pytest.mark.parametrize(("size", "shape"), [(48, (48, 48, 3)), ((32, 64), (32, 64, 3))])
def test_random_resized_crop_resizes_the_cut_box(size, shape):
    photo = skimage.data.astronaut()
    arguments = (0.1, 0.2), (3 / 4, 4 / 3)
    left, upper, right, lower = augment.random_crop_box(512, 512, *arguments, np.random.default_rng(5))
    found = augment.random_resized_crop(Image.fromarray(photo), size, *arguments, np.random.default_rng(5))
    # not resize(box=...): pixels just outside the box must not bleed in
    assert_close_pixels(np.asarray(found), bicubic(photo[upper:lower, left:right], *shape[:2]))


@pytest.mark.parametrize(
    ("photo", "size", "crop", "resized", "corner"),
    [
        (skimage.data.chelsea(), 224, 0.875, (256, 384), (16, 80)),  # 300 x 451: 384.85 rounds down
        (skimage.data.chelsea().transpose(1, 0, 2), 224, 0.9, (372, 248), (74, 12)),  # 372.8
        (skimage.data.astronaut(), 96, 0.875, (109, 109), (6, 6)),  # 109.7 rounds down; 6.5 to the even 6
        (skimage.data.astronaut(), 99, 0.95, (104, 104), (2, 2)),  # 2.5 to the even 2
        (skimage.data.astronaut(), 64, 1.0, (64, 64), (0, 0)),
        (skimage.data.chelsea(), (96, 256), 0.8, (212, 320), (58, 32)),  # covers 120 x 320
        (skimage.data.chelsea()[:20, :30], 64, 0.875, (73, 109), (4, 22)),  # enlarged; 4.5 to 4, 22.5 to 22
    ],
)
def test_eval_crop(photo, size, crop, resized, corner):
    height, width = (size, size) if isinstance(size, int) else size
    expected = bicubic(photo, *resized)[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    assert_close_pixels(np.asarray(augment.eval_crop(Image.fromarray(photo), size, crop)), expected)


def test_eval_crop_never_leaves_the_image():
    rng = np.random.default_rng(0)
    for width, height, size_h, size_w in rng.integers(1, 90, (200, 4)):
        image = Image.new("RGB", (int(width), int(height)), (9, 9, 9))
        cut = augment.eval_crop(image, (int(size_h), int(size_w)), rng.uniform(0.5, 1))
        assert np.asarray(cut).shape == (size_h, size_w, 3) and np.asarray(cut).min() == 9  # no black border


def test_eval_crop_refuses_enlargement():
    with pytest.raises(ValueError, match=r"data\.eval_crop: 1\.1"):
        augment.eval_crop(Image.new("RGB", (8, 8)), 8, 1.1)


def test_random_flip():
    photo = skimage.data.astronaut()[:8, :6]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(np.asarray(augment.random_flip(Image.fromarray(photo), 1.0, rng)), photo[:, ::-1])
    np.testing.assert_array_equal(np.asarray(augment.random_flip(Image.fromarray(photo), 0.0, rng)), photo)
    flips = [
        np.array_equal(augment.random_flip(Image.fromarray(photo), 0.25, rng), photo[:, ::-1]) for _ in range(1000)
    ]
    assert 200 < sum(flips) < 300
