"""Host-side image transforms on Pillow, with the semantics of torchvision and timm, pixel for pixel.

Sizes are one int (square) or (height, width). Randomness comes from the `np.random.Generator` that is passed in.
"""

import io
import math

import numpy as np
from PIL import Image

Size = int | tuple[int, int]


def decode(data: bytes) -> Image.Image:
    """Decodes a PNG, JPEG ... into an RGB image; grey is repeated, CMYK and palettes converted, alpha dropped.

    EXIF orientation is ignored, as torchvision and timm do: published accuracies were measured that way.

    Raises:
      ValueError: the bytes are no readable image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    # Broad: on damaged files Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError and others.
    except Exception as error:
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "transparency" in image.info:  # convert() to RGB alone warns on a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the (left, upper, right, lower) box of torchvision's and timm's RandomResizedCrop.

    Area uniform in `scale` times the image's, width / height log-uniform in `ratio`; if ten draws do not fit, the
    largest centred box whose aspect ratio lies in `ratio`.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            upper = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, upper, left + crop_width, upper + crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def random_resized_crop(
    image: Image.Image,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Image.Image:
    """Crops a random box (`random_crop_box`) and resizes it to `size`, bicubic.

    `scale` is the range of area fractions, `ratio` that of width / height before resizing.
    """
    height, width = height_width(size)
    # Crop, then resize: resize(box=...) would let the filter read pixels beyond the box, which torchvision does not.
    cropped = image.crop(random_crop_box(*image.size, scale, ratio, rng))
    return cropped.resize((width, height), Image.Resampling.BICUBIC)


def random_flip(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Mirrors left and right with the given probability."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < probability else image


def eval_crop(image: Image.Image, size: Size, crop: float) -> Image.Image:
    """Resizes the shorter side to floor(size / crop), bicubic, and cuts the centre: torchvision's and timm's way.

    For a (height, width) that is not square, the image is resized just to cover (floor(height / crop),
    floor(width / crop)). `crop` is the fraction kept, e.g. 224 / 256 = 0.875.

    Raises:
      ValueError: `crop` is not in (0, 1].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"data.eval_crop: {crop} is not in (0, 1].")
    height, width = height_width(size)
    target_height, target_width = math.floor(height / crop), math.floor(width / crop)
    # The side that needs the larger factor meets its target; the other rounds down, as in torchvision.
    if target_height / image.height >= target_width / image.width:
        resized = target_height, int(target_height * image.width / image.height)
    else:
        resized = int(target_width * image.height / image.width), target_width
    image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
    # round() takes halves to the even neighbour, as in torchvision; (a - b) // 2 is one pixel off for some sizes.
    upper, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, upper, left + width, upper + height))


def height_width(size: Size) -> tuple[int, int]:
    """Spells a size out as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
