"""The operations that RandAugment, AutoAugment and 3-Augment are made of: an RGB Pillow image in, another out.

Each gives the pixels of timm's function of that name (`timm/data/auto_augment.py`) and takes its argument in pixels,
degrees or factors; `policies.py` knows how these follow from a magnitude. What geometric ones bring in from outside the
image is filled with `FILL`.
"""

import math

import numpy as np
import PIL
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

try:
    from vitpyramid.data import kernels
except ImportError:  # numba is optional
    kernels = None

FILL = (124, 116, 104)  # round(255 * mean of ImageNet), as timm has it

# Pillow up to 12 resizes across and then down in every case. Bytes between the two passes are rounded, so the order
# changes levels: by up to 16 in crops of photos, 0.23 in the mean of a crop.
_MAY_GO_DOWN_FIRST = int(PIL.__version__.partition(".")[0]) >= 13

Resample = Image.Resampling


def resize(
    pixels: np.ndarray, height: int, width: int, resample: Resample, box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """Antialiased resize of uint8 [H, W, 3]: the pixels of the installed Pillow's `resize`.

    Args:
      box: (left, upper, right, lower) of what is kept of the result, as in Pillow's `crop`; None: all of it.
    """
    box = box or (0, 0, width, height)
    if kernels is None:
        return Image.fromarray(pixels).resize((width, height), resample).crop(box)
    fewer_rows, fewer_columns = pixels.shape[0] - height, pixels.shape[1] - width
    down_first = _MAY_GO_DOWN_FIRST and fewer_rows > max(0, 2 * fewer_columns)
    return Image.fromarray(kernels.resize(pixels, height, width, resample == Resample.BICUBIC, down_first, box))


def shear_x(image: Image.Image, factor: float, resample: Resample) -> Image.Image:
    """Row y is taken from factor * (y + 0.5) pixels further right."""
    return _slide(image, factor, 0.0, False, resample)


def shear_y(image: Image.Image, factor: float, resample: Resample) -> Image.Image:
    """Column x is taken from factor * (x + 0.5) pixels further down."""
    return _slide(image, factor, 0.0, True, resample)


def translate_x(image: Image.Image, share: float, resample: Resample) -> Image.Image:
    """Moves the image `share` of its width to the left."""
    return _slide(image, 0.0, share * image.width, False, resample)


def translate_y(image: Image.Image, share: float, resample: Resample) -> Image.Image:
    """Moves the image `share` of its height upwards."""
    return _slide(image, 0.0, share * image.height, True, resample)


def _slide(image: Image.Image, slope: float, offset: float, down: bool, resample: Resample) -> Image.Image:
    if kernels is not None:
        cubic = resample == Resample.BICUBIC
        return Image.fromarray(kernels.slide(np.asarray(image), slope, offset, down, cubic, FILL))
    matrix = (1, 0, 0, slope, 1, offset) if down else (1, slope, offset, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def rotate(image: Image.Image, degrees: float, resample: Resample) -> Image.Image:
    """Turns counter-clockwise about the centre."""
    if kernels is None or degrees % 90 == 0:  # Pillow turns those by moving pixels
        return image.rotate(degrees, resample, fillcolor=FILL)
    # As Pillow's `rotate` has it, the order of the sums included.
    angle, x, y = -math.radians(degrees % 360.0), image.width / 2, image.height / 2
    cosine, sine, minus_sine = (round(part, 15) for part in (math.cos(angle), math.sin(angle), -math.sin(angle)))
    matrix = (
        cosine,
        sine,
        cosine * -x + sine * -y + 0.0 + x,
        minus_sine,
        cosine,
        minus_sine * -x + cosine * -y + 0.0 + y,
    )
    return Image.fromarray(kernels.affine(np.asarray(image), matrix, resample == Resample.BICUBIC, FILL))


def auto_contrast(image: Image.Image) -> Image.Image:
    """Stretches each channel to 0 ... 255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image) -> Image.Image:
    """Flattens each channel's histogram."""
    return ImageOps.equalize(image)


def invert(image: Image.Image) -> Image.Image:
    """255 - level."""
    return ImageOps.invert(image)


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Inverts levels of `threshold` and more; 256 changes nothing."""
    return image.point([level if level < threshold else 255 - level for level in range(256)] * 3)


def solarize_add(image: Image.Image, amount: int) -> Image.Image:
    """Adds `amount` to levels below 128, up to 255."""
    return image.point([min(255, level + amount) if level < 128 else level for level in range(256)] * 3)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the `bits` highest bits, 0 to 8, of each level; 0 makes the image black, which Pillow 13 itself refuses."""
    mask = 0x100 - (1 << (8 - bits))
    return image.point([level & mask for level in range(256)] * 3)


def color(image: Image.Image, factor: float) -> Image.Image:
    """Between grey (0) and the image (1), and beyond."""
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Between the mean grey level (0) and the image (1), and beyond."""
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Levels times `factor`, up to 255."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Between the image smoothed by 3 x 3 (0) and the image (1), and beyond."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    """Pillow's approximation, by three box filters, of a Gaussian with a standard deviation of `radius` pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def grey(image: Image.Image) -> Image.Image:
    """Luma 0.299 R + 0.587 G + 0.114 B in all three channels."""
    return image.convert("L").convert("RGB")
