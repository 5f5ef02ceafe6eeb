"""vitpyramid.data.image_ops and kernels against timm (goldens/augment.npz) and against Pillow, to the bit."""

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageOps

from golden import FOLDER
from vitpyramid.data import image_ops as ops
from vitpyramid.data import kernels, policies

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
GOLDENS = dict(np.load(FOLDER / "augment.npz"))
PHOTOS = {"astronaut": skimage.data.astronaut(), "cat": skimage.data.chelsea(), "coffee": skimage.data.coffee()}


@pytest.fixture(params=["numba", "Pillow"])
def backend(request, monkeypatch):
    """Each operation with and without numba."""
    if request.param == "Pillow":
        monkeypatch.setattr(ops, "kernels", None)


@pytest.fixture(params=PHOTOS)
def photo(request):
    return Image.fromarray(PHOTOS[request.param]).crop((90, 20, 281, 250))


class Sign:
    """A stand-in for np.random.Generator that makes arguments positive or negative."""

    def __init__(self, sign):
        self.sign = sign

    def random(self):
        return 0.9 if self.sign == "+" else 0.1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("key", [key for key in GOLDENS if key.count(" ") == 3])
def test_operation_at_a_level_is_timms(key):
    name, level, sign, resample = key.split()
    draw = {"bicubic": BICUBIC, "bilinear": BILINEAR}.get(resample)
    found = policies.apply_step(name, float(level), Image.fromarray(GOLDENS["photo"]), lambda: draw, Sign(sign))
    np.testing.assert_array_equal(np.asarray(found), GOLDENS[key])


def transform(image, matrix, resample):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=(124, 116, 104))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("value", [-0.405, -0.27, -0.001, 0.0, 0.27, 0.41])
def test_geometric_operations_are_pillows(photo, value, resample):
    width, height = photo.size
    cases = {
        ops.shear_x: (1, value, 0, 0, 1, 0),
        ops.shear_y: (1, 0, 0, value, 1, 0),
        ops.translate_x: (1, 0, value * width, 0, 1, 0),
        ops.translate_y: (1, 0, 0, 0, 1, value * height),
    }
    for operation, matrix in cases.items():
        expected = transform(photo, matrix, resample)
        np.testing.assert_array_equal(np.asarray(operation(photo, value, resample)), np.asarray(expected))
    for degrees in (66 * value, 400 * value, round(450 * value, -1)):
        expected = photo.rotate(degrees, resample, fillcolor=(124, 116, 104))
        np.testing.assert_array_equal(np.asarray(ops.rotate(photo, degrees, resample)), np.asarray(expected))


def test_directions_and_fill():
    photo = Image.fromarray(PHOTOS["astronaut"][:40, :60])
    pixels = np.asarray(photo)
    left = np.asarray(ops.translate_x(photo, 0.25, BICUBIC))
    np.testing.assert_array_equal(left[:, :45], pixels[:, 15:])
    assert (left[:, 45:] == (124, 116, 104)).all()
    up = np.asarray(ops.translate_y(photo, 0.25, BILINEAR))
    np.testing.assert_array_equal(up[:30], pixels[10:])
    turned = np.asarray(ops.rotate(Image.fromarray(pixels[:40, :40]), 90, BICUBIC))
    np.testing.assert_array_equal(turned, np.rot90(pixels[:40, :40]))


def test_level_operations_are_pillows(photo):
    for bits in range(1, 8):
        np.testing.assert_array_equal(ops.posterize(photo, bits), ImageOps.posterize(photo, bits))
    np.testing.assert_array_equal(ops.posterize(photo, 8), photo)
    assert not np.asarray(ops.posterize(photo, 0)).any()  # what Pillow up to 12 made of it
    for threshold in (0, 1, 26, 128, 255, 256):
        np.testing.assert_array_equal(ops.solarize(photo, threshold), ImageOps.solarize(photo, threshold))
    levels = np.asarray(photo).astype(int)
    np.testing.assert_array_equal(
        ops.solarize_add(photo, 110), np.where(levels < 128, np.minimum(levels + 110, 255), levels)
    )
    np.testing.assert_array_equal(ops.grey(photo), ImageEnhance.Color(photo).enhance(0.0))
    for operation, reference in (
        (ops.color, ImageEnhance.Color),
        (ops.contrast, ImageEnhance.Contrast),
        (ops.brightness, ImageEnhance.Brightness),
        (ops.sharpness, ImageEnhance.Sharpness),
    ):
        for factor in (0.1, 0.19, 1.0, 1.81):
            np.testing.assert_array_equal(operation(photo, factor), reference(photo).enhance(factor))


SIZES = [(224, 224), (96, 64), (7, 300), (230, 100), (100, 191), (230, 191), (1, 1), (152, 152), (151, 152), (229, 192)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resize_is_pillows(photo, resample, height, width):
    found = ops.resize(np.asarray(photo), height, width, resample)  # 230 x 191
    np.testing.assert_array_equal(np.asarray(found), np.asarray(photo.resize((width, height), resample)))


@pytest.mark.usefixtures("backend")
def test_resize_of_noise_is_pillows():
    """Where Pillow's choice of the order shows most."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, new_height, new_width = (int(side) for side in np.exp(rng.uniform(0, np.log(300), 4)))
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = Image.fromarray(pixels).resize((new_width, new_height), BICUBIC)
        found = ops.resize(pixels, new_height, new_width, BICUBIC)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), f"{pixels.shape} to {found.size}")


@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
def test_kernels_resize_in_either_order(photo, resample):
    """Both, whichever Pillow is installed."""
    pixels, cubic = np.asarray(photo), resample == BICUBIC
    for height, width in SIZES:
        across = photo.resize((width, 230), resample).resize((width, height), resample)
        down = photo.resize((191, height), resample).resize((width, height), resample)
        for box in (0, 0, width, height), (width // 3, height // 4, width - width // 4, height - height // 3):
            for down_first, expected in (False, across), (True, down):
                found = kernels.resize(pixels, height, width, cubic, down_first, box)
                np.testing.assert_array_equal(found, np.asarray(expected.crop(box)))


def test_kernels_take_crops_and_read_only_images():
    pixels = PHOTOS["cat"]
    crop = pixels[20:120, 30:100]
    assert not crop.flags.c_contiguous
    frozen = crop.copy()
    frozen.flags.writeable = False
    for down_first in False, True:
        found = (kernels.resize(image, 50, 40, True, down_first, (0, 0, 40, 50)) for image in (crop, frozen))
        np.testing.assert_array_equal(*found)
    arguments = (0.2, 3.5, True, True, (1, 2, 3))
    np.testing.assert_array_equal(kernels.slide(crop, *arguments), kernels.slide(frozen, *arguments))
