"""vitpyramid.data.augment's and jpeg's decoding against Pillow: modes, damage, parts of JPEGs, limits."""

import io
import warnings

import numpy as np
import pytest
import skimage.data
from ml_collections import ConfigDict
from PIL import Image

from streams import encoded
from vitpyramid.data import augment, image_ops, jpeg


def settings(**changes):
    keys = {"image_size": 64, "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip": 0.5, "eval_crop": 0.875}
    keys |= {
        "crop_padding": 0,
        "interpolation": "bicubic",
        "eval_interpolation": "bicubic",
        "auto_augment": "",
        "color_jitter": 0.0,
    }
    return augment.from_config(ConfigDict(keys | changes))


def by_pillow_alone(monkeypatch):
    monkeypatch.setattr(image_ops, "kernels", None)
    monkeypatch.setattr(jpeg, "simplejpeg", None)


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


def test_decode_grey_of_more_than_eight_bits():
    levels = np.array([[0, 1, 255, 256, 511, 32767, 32768, 65535]])
    high = [0, 0, 0, 1, 1, 127, 128, 255]
    pgm = b"P5 8 1 65535\n" + levels.astype(">u2").tobytes()
    files = {
        "16-bit PNG": (encoded(Image.fromarray(levels.astype(np.uint16))), high),
        "16-bit TIFF": (encoded(Image.fromarray(levels.astype(np.uint16)), "tiff"), high),
        "big-endian TIFF": (encoded(Image.frombytes("I;16B", (8, 1), levels.astype(">u2").tobytes()), "tiff"), high),
        "16-bit PGM": (pgm, high),
        "10-bit PGM": (b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes(), [0, 128, 255]),
        "32-bit TIFF": (encoded(Image.fromarray(levels[:, :3].astype(np.int32)), "tiff"), [0, 1, 255]),
    }
    for name, (data, expected) in files.items():
        pixels = np.asarray(augment.decode(data))
        np.testing.assert_array_equal(pixels, np.repeat(expected, 3).reshape(1, -1, 3), name)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (
            np.array([[0, 256]], np.int32),
            "a grey image of 32 bits, or signed, with levels from 0 to 256, expected 0 to 255",
        ),
        (np.array([[-1, 9]], np.int32), "levels from -1 to 9, expected"),
        (
            np.array([[0.0, 1.0]], np.float32),
            "a grey image of floating point numbers, expected unsigned integers of 8 or 16",
        ),
    ],
)
def test_grey_without_a_known_white_is_refused(pixels, words):
    data = encoded(Image.fromarray(pixels), "tiff")
    for read in (
        augment.decode,
        lambda data: augment.eval_image(data, settings()),
        lambda data: augment.train_image(data, np.random.default_rng(0), settings()),
    ):
        with pytest.raises(ValueError, match=words):
            read(data)


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


def photos():
    """JPEGs of every sampling of colours, of one and of several passes, grey, in odd sizes."""
    images = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()[:333, :477]]
    images = [Image.fromarray(image) for image in images]
    for subsampling in (0, 1, 2):
        yield encoded(images[subsampling], "jpeg", quality=90, subsampling=subsampling)
    yield encoded(images[0], "jpeg", quality=90, progressive=True)
    yield encoded(images[1], "jpeg", quality=75, restart_marker_rows=1)
    yield encoded(images[1], "jpeg", quality=75, restart_marker_blocks=5, progressive=True)
    yield encoded(images[2].convert("L"), "jpeg", quality=95)
    yield encoded(images[2], "jpeg", quality=50, exif=Image.Exif(), comment=b"\xff\xc0 no frame")


@pytest.mark.parametrize("data", list(photos()))
def test_jpeg_rows_are_pillows(data):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    width, height = jpeg.size(data)
    assert (height, width, 3) == expected.shape
    for rows in (1, 13, 14, 15, 16, 17, height // 2, height - 1, height):
        found = jpeg.decode(data, height, rows)
        assert rows <= len(found) <= min(height, rows + 17)
        np.testing.assert_array_equal(found[:rows], expected[:rows])


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_the_limit_can_be_moved(monkeypatch, decoder):
    if decoder == "Pillow":
        by_pillow_alone(monkeypatch)
    data = encoded(Image.new("L", (40, 25), 80), "jpeg")
    for limit in 500, 1000, None:  # twice the limit is allowed, with a warning
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert augment.decode(data).size == (40, 25)
        assert [one.category for one in caught] == ([Image.DecompressionBombWarning] if limit == 500 else [])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 499)
    with pytest.raises(ValueError, match="1000 pixels. exceeds limit of 998 pixels"):
        augment.decode(data)


def test_orientation_is_ignored():
    photo, exif = Image.fromarray(skimage.data.chelsea()), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(photo, "jpeg", exif=exif)
    assert augment.decode(data).size == photo.size
