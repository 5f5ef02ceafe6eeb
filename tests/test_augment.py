"""vitpyramid.data.augment against torchvision's formulas, an independent bicubic resize, and Pillow."""

import io
import math
import pickle
import warnings

import numpy as np
import pytest
import skimage.data
from PIL import Image

from streams import encoded
from test_decode import by_pillow_alone, photos, settings
from vitpyramid.data import augment, image_ops, jpeg, policies

RECIPE = "rand-m9-mstd0.5-inc1"


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


# Whole images


@pytest.mark.parametrize("changes", [{"auto_augment": RECIPE}, {"auto_augment": "3a", "color_jitter": 0.3}])
def test_train_image_is_the_same_without_simplejpeg_and_numba(monkeypatch, changes):
    chosen = settings(interpolation="random", image_size=(48, 80), **changes)
    files = [*photos()] * 3
    fast = [augment.train_image(data, np.random.default_rng(i), chosen) for i, data in enumerate(files)]
    by_pillow_alone(monkeypatch)
    for i, data in enumerate(files):
        np.testing.assert_array_equal(augment.train_image(data, np.random.default_rng(i), chosen), fast[i])


@pytest.mark.parametrize("size", [64, (32, 72)])
def test_train_image_resizes_the_cut_box(size):
    data, chosen = encoded(Image.fromarray(skimage.data.coffee())), settings(flip=1.0, image_size=size)
    rng = np.random.default_rng(3)
    left, upper, right, lower = augment.random_crop_box(600, 400, (0.08, 1.0), (3 / 4, 4 / 3), rng)
    # not resize(box=...): pixels just outside the box must not bleed in
    expected = bicubic(skimage.data.coffee()[upper:lower, left:right], *chosen.image_size)[:, ::-1]
    found = augment.train_image(data, np.random.default_rng(3), chosen)
    assert found.dtype == np.uint8
    assert_close_pixels(found, expected)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 60), (50, 30)])
def test_padded_crop(height, width):
    photo = skimage.data.astronaut()[:height, :width]
    data, chosen = encoded(Image.fromarray(photo)), settings(image_size=32, crop_padding=4, flip=0.0)
    scale = 32 / min(height, width)
    resized = Image.fromarray(photo).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    padded = np.pad(np.asarray(resized), ((4, 4), (4, 4), (0, 0)))
    places = [(y, x) for y in range(len(padded) - 31) for x in range(padded.shape[1] - 31)]
    cuts = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y, x in places}
    assert len(cuts) == len(places)
    found = [cuts[augment.train_image(data, np.random.default_rng(i), chosen).tobytes()] for i in range(600)]
    rows, columns = np.array(found).T
    assert rows.min() == columns.min() == 0
    assert (rows.max(), columns.max()) == (len(padded) - 32, padded.shape[1] - 32)
    assert (
        abs(rows.mean() - rows.max() / 2) < rows.max() / 10
        and abs(columns.mean() - columns.max() / 2) < columns.max() / 10
    )


def test_train_image_applies_policy_and_jitter():
    data = encoded(Image.fromarray(skimage.data.chelsea()))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (451 / 300, 451 / 300), "flip": 0.0}

    def distinct(**changes):
        chosen = settings(**whole, **changes)
        return len({augment.train_image(data, np.random.default_rng(i), chosen).tobytes() for i in range(40)})

    assert distinct() == 1
    assert 1 < distinct(interpolation="random") <= 2
    assert distinct(color_jitter=0.4) == 40
    assert 20 < distinct(auto_augment=RECIPE) <= 40  # a quarter are left alone
    # timm's rule: no jitter beside a policy, but beside 3-Augment, of whose three draws two have nothing else to draw
    assert settings(auto_augment=RECIPE, color_jitter=0.4).color_jitter == 0
    assert distinct(auto_augment="3a") < 20 < distinct(auto_augment="3a", color_jitter=0.3) == 40


def test_every_geometric_operation_draws_its_own_filter(monkeypatch):
    crop, seen = image_ops.resize, []
    monkeypatch.setattr(image_ops, "resize", lambda *args: seen.append([args[-1]]) or crop(*args))
    for name, (_, largest) in policies._GEOMETRIC.items():
        record = lambda image, argument, resample: seen[-1].append(resample) or image  # noqa: E731
        monkeypatch.setitem(policies._GEOMETRIC, name, (record, largest))
    chosen = settings(interpolation="random", auto_augment="rand-m9-n4-p1")
    data = encoded(Image.fromarray(skimage.data.astronaut()[:40, :40]))
    for i in range(400):
        augment.train_image(data, np.random.default_rng(i), chosen)
    pairs = [tuple(filters[:2]) for filters in seen if len(filters) > 1]
    assert len(pairs) > 250 and len(set(pairs)) == 4
    for pair in set(pairs):
        assert 0.17 < pairs.count(pair) / len(pairs) < 0.33


@pytest.mark.parametrize("data", list(photos()))
def test_eval_image_is_pillows(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for name, resample in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        shorter = min(image.size)
        size = [73 if side == shorter else int(73 * side / shorter) for side in image.size]  # floor(64 / 0.875)
        left, upper = round((size[0] - 64) / 2), round((size[1] - 64) / 2)
        expected = image.resize(size, resample).crop((left, upper, left + 64, upper + 64))
        found = augment.eval_image(data, settings(eval_interpolation=name))
        np.testing.assert_array_equal(found, np.asarray(expected))


ODD = {
    "one pixel": Image.new("RGB", (1, 1), (200, 10, 30)),
    "one row": Image.new("RGB", (300, 1), (200, 10, 30)),
    "one column": Image.new("RGB", (1, 300), (200, 10, 30)),
    "smaller than 32": Image.new("RGB", (20, 9), (200, 10, 30)),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp"])
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name, kind):
    data, chosen = encoded(ODD[name], kind), settings(auto_augment=RECIPE)
    image = augment.eval_image(data, chosen)
    assert image.shape == (64, 64, 3) and np.abs(image.astype(int) - (200, 10, 30)).max() < 6
    for i in range(5):
        assert augment.train_image(data, np.random.default_rng(i), chosen).shape == (64, 64, 3)


def test_odd_modes_through_train_and_eval():
    photo = Image.fromarray(skimage.data.astronaut()[:90, :70])
    sixteen = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 256)
    palette = photo.quantize(16)
    palette.info["transparency"] = bytes(range(16))
    files = {
        "L": encoded(photo.convert("L"), "jpeg"),
        "CMYK": encoded(photo.convert("CMYK"), "jpeg"),
        "palette with transparency": encoded(palette),
        "16 bits": encoded(sixteen),
    }
    assert jpeg.size(files["CMYK"]) is None and jpeg.size(encoded(photo)) is None and jpeg.size(files["L"]) == (70, 90)
    plain = settings(flip=0.0, image_size=(90, 70), crop_scale=(1.0, 1.0), crop_ratio=(7 / 9, 7 / 9), eval_crop=1.0)
    for name, data in files.items():
        whole = np.asarray(augment.decode(data))
        np.testing.assert_array_equal(augment.train_image(data, np.random.default_rng(0), plain), whole, name)
        np.testing.assert_array_equal(augment.eval_image(data, plain), whole, name)


def test_more_than_50_megapixels():
    data = encoded(Image.new("L", (9000, 5700), 80), "jpeg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = augment.train_image(
            data, np.random.default_rng(0), settings(crop_scale=(0.9, 1.0), crop_ratio=(1.4, 1.5))
        )
    assert (image == 80).all()


def claims(side):
    """A JPEG of a few hundred bytes whose header says that it has side x side pixels."""
    data = bytearray(encoded(Image.new("L", (64, 64), 80), "jpeg"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = 2 * side.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_every_decoder_has_pillows_limit_of_pixels(monkeypatch, decoder):
    if decoder == "Pillow":
        by_pillow_alone(monkeypatch)
    # Twice MAX_IMAGE_PIXELS.
    message = "not a readable image .*: Image size .400000000 pixels. exceeds limit of 178956970 pixels"
    for chosen in settings(), settings(crop_padding=4):
        with pytest.raises(ValueError, match=message):
            augment.train_image(claims(20_000), np.random.default_rng(0), chosen)
    with pytest.raises(ValueError, match=message):
        augment.eval_image(claims(20_000), settings())


@pytest.mark.parametrize("chosen", [settings(), settings(auto_augment=RECIPE)])
def test_damage_is_an_error_however_it_is_read(monkeypatch, chosen):
    data = encoded(Image.fromarray(skimage.data.astronaut()), "jpeg")
    for path in ("simplejpeg", "Pillow"):
        for damaged in (data[: len(data) // 2], data[:300], b"", b"\xff\xd8\xff\xd9", data[:200] + b"\xff\xd9"):
            with pytest.raises(ValueError, match="not a readable image"):
                augment.train_image(damaged, np.random.default_rng(0), chosen)
            with pytest.raises(ValueError, match="not a readable image"):
                augment.eval_image(damaged, chosen)
        if path == "simplejpeg":
            by_pillow_alone(monkeypatch)


def test_settings_are_picklable_and_checked():
    chosen = settings(auto_augment=RECIPE, interpolation="random", image_size=(48, 80))
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert chosen.image_size == (48, 80) and settings().image_size == (64, 64)
    with pytest.raises(
        ValueError, match=r"data\.interpolation = 'cubic': expected one of 'bicubic', 'bilinear', 'random'"
    ):
        settings(interpolation="cubic")
    with pytest.raises(ValueError, match=r"data\.eval_interpolation = 'random': expected one of 'bicubic', 'bilinear'"):
        settings(eval_interpolation="random")
    with pytest.raises(ValueError, match=r"data\.auto_augment = 'rand-x': 'x' .*expected"):
        settings(auto_augment="rand-x")
