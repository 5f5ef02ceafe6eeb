"""What the host does to an image: decode, crop and resize, and in training flip and augment.

Pixels are those of torchvision and timm on Pillow; simplejpeg and numba, where installed, make the same ones sooner.
Sizes are one int (square) or (height, width). Randomness comes from the `np.random.Generator` that is passed in.
"""

import dataclasses
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitpyramid.data import image_ops, jpeg, policies

Size = int | tuple[int, int]
Box = tuple[int, int, int, int]  # left, upper, right, lower

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What `train_image` and `eval_image` do, from the keys of `config.data` with the same names; picklable.

    Attributes:
      image_size: (height, width) of the result.
      crop_scale, crop_ratio: see `random_crop_box`.
      crop_padding: pixels; above 0, `padded_crop` replaces the random resized crop.
      flip: probability of mirroring left and right.
      interpolation: filters of crop and geometric operations; of several, one is drawn each time.
      policy: RandAugment and its like, or None.
      color_jitter: strength of `policies.color_jitter`; timm ignores it beside a policy other than 3-Augment, and so
        does `from_config`.
      eval_crop: see `eval_crop`.
      eval_interpolation: filter of evaluation.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    crop_padding: int
    flip: float
    interpolation: tuple[Image.Resampling, ...]
    policy: policies.Policy | None
    color_jitter: float
    eval_crop: float
    eval_interpolation: Image.Resampling


def from_config(data) -> Augmentation:
    """The settings that `config.data` describes.

    Raises:
      ValueError: an unknown `auto_augment`, `interpolation` or `eval_interpolation`.
    """
    choices = _RESAMPLE | {"random": tuple(_RESAMPLE.values())}
    filters = _choose("data.interpolation", data.interpolation, choices)
    policy = policies.parse(data.auto_augment)
    return Augmentation(
        image_size=height_width(data.image_size),
        crop_scale=tuple(data.crop_scale),
        crop_ratio=tuple(data.crop_ratio),
        crop_padding=data.crop_padding,
        flip=data.flip,
        interpolation=filters if isinstance(filters, tuple) else (filters,),
        policy=policy,
        color_jitter=data.color_jitter if data.auto_augment in ("", "3a") else 0.0,
        eval_crop=data.eval_crop,
        eval_interpolation=_choose("data.eval_interpolation", data.eval_interpolation, _RESAMPLE),
    )


def _choose(key: str, value: str, choices: dict):
    if value not in choices:
        raise ValueError(f"{key} = {value!r}: expected one of {', '.join(map(repr, choices))}")
    return choices[value]


def train_image(data: bytes, rng: np.random.Generator, settings: Augmentation) -> np.ndarray:
    """Decodes a training image and augments it: random crop, flip, policy, colour jitter.

    Returns:
      uint8 [height, width, 3] of `settings.image_size`, read-only.

    Raises:
      ValueError: the bytes are no readable image.
    """

    def resample() -> Image.Resampling:
        filters = settings.interpolation
        return filters[rng.integers(len(filters))] if len(filters) > 1 else filters[0]

    if settings.crop_padding > 0:
        image = padded_crop(decode(data), settings.image_size, settings.crop_padding, resample(), rng)
    else:
        box = _decode_box(data, lambda w, h: random_crop_box(w, h, settings.crop_scale, settings.crop_ratio, rng))
        image = image_ops.resize(box, *settings.image_size, resample())
    image = random_flip(image, settings.flip, rng)
    if settings.policy is not None:
        image = policies.apply(settings.policy, image, resample, rng)
    if settings.color_jitter > 0:
        image = policies.color_jitter(image, settings.color_jitter, rng)
    return np.asarray(image)


def eval_image(data: bytes, settings: Augmentation) -> np.ndarray:
    """Decodes an image and cuts its centre, see `eval_crop`.

    Returns:
      uint8 [height, width, 3] of `settings.image_size`, read-only.

    Raises:
      ValueError: the bytes are no readable image.
    """
    pixels = _decode_jpeg(data)
    pixels = np.asarray(_decode_by_pillow(data)) if pixels is None else pixels
    return np.asarray(_centre(pixels, settings.image_size, settings.eval_crop, settings.eval_interpolation))


def decode(data: bytes) -> Image.Image:
    """Decodes a PNG, JPEG ... into an RGB image; grey is repeated, CMYK and palettes converted, alpha dropped.

    Of 16-bit grey the high byte is kept: 65535 is white in PNG, TIFF and PGM, and Pillow's own conversion, which clips
    at 255, makes nearly everything white. No level of 32-bit grey is known to be white, so only integers of 0 to 255
    are taken, as they are, which is Pillow's conversion; other ones and floating point numbers are refused.

    EXIF orientation is ignored, as torchvision and timm do: published accuracies were measured that way.

    Raises:
      ValueError: the bytes are no readable image, one of more pixels than Pillow's limit (178,956,970, which is twice
        `PIL.Image.MAX_IMAGE_PIXELS`), or 32-bit grey as above.
    """
    pixels = _decode_jpeg(data)
    return _decode_by_pillow(data) if pixels is None else Image.fromarray(pixels)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    size = jpeg.size(data)
    return None if size is None else jpeg.decode(data, size[1], size[1])


def _decode_by_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:  # whose own message names an object in memory
        raise ValueError(f"not a readable image ({len(data)} bytes): of no known format") from error
    # Broad: on damaged files Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError and others.
    except Exception as error:
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of whatever mode, loaded, as `decode` gives it."""
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if "transparency" in image.info:  # convert() to RGB alone warns on a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as grey of 8 bits; see `decode`."""
    levels = np.asarray(image)
    if image.mode == "F":
        raise ValueError("a grey image of floating point numbers, expected unsigned integers of 8 or 16 bits")
    if image.mode != "I" or image.format == "PPM":  # PGM of 16 bits comes as 32, stretched to 65535
        levels = levels // 256
    elif levels.min() < 0 or levels.max() > 255:
        raise ValueError(
            f"a grey image of 32 bits, or signed, with levels from {levels.min()} to {levels.max()}, expected 0 to 255"
        )
    return Image.fromarray(levels.astype(np.uint8))


def _decode_box(data: bytes, choose: Callable[[int, int], Box]) -> np.ndarray:
    """The pixels, uint8 [h, w, 3], of the box that `choose` draws given the image's width and height."""
    size = jpeg.size(data)
    image = _decode_by_pillow(data) if size is None else None
    left, upper, right, lower = box = choose(*(size or image.size))
    if size is not None:
        pixels = jpeg.decode(data, size[1], lower)
        if pixels is not None:
            return pixels[upper:lower, left:right]
        image = _decode_by_pillow(data)
    return np.asarray(image.crop(box))


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
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


def padded_crop(
    image: Image.Image, size: Size, padding: int, resample: Image.Resampling, rng: np.random.Generator
) -> Image.Image:
    """Resizes just to cover `size`, adds `padding` black pixels on every side, and cuts a random piece of `size`.

    torchvision's Resize, then RandomCrop with padding: `transfer_learning.py` of T2T-ViT.
    """
    height, width = height_width(size)
    pixels = np.asarray(image)
    image = ImageOps.expand(image_ops.resize(pixels, *_covering(pixels, height, width), resample), padding)
    upper, left = rng.integers(image.height - height + 1), rng.integers(image.width - width + 1)
    return image.crop((left, upper, left + width, upper + height))


def random_flip(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Mirrors left and right with the given probability."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < probability else image


def eval_crop(
    image: Image.Image, size: Size, crop: float, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resizes the shorter side to floor(size / crop) and cuts the centre: torchvision's and timm's way.

    For a (height, width) that is not square, the image is resized just to cover (floor(height / crop),
    floor(width / crop)). `crop` is the fraction kept, e.g. 224 / 256 = 0.875.

    Raises:
      ValueError: `crop` is not in (0, 1].
    """
    return _centre(np.asarray(image), size, crop, resample)


def _centre(pixels: np.ndarray, size: Size, crop: float, resample: Image.Resampling) -> Image.Image:
    if not 0 < crop <= 1:
        raise ValueError(f"data.eval_crop: {crop} is not in (0, 1].")
    height, width = height_width(size)
    rows, columns = _covering(pixels, math.floor(height / crop), math.floor(width / crop))
    # round() takes halves to the even neighbour, as in torchvision; (a - b) // 2 is one pixel off for some sizes.
    upper, left = round((rows - height) / 2), round((columns - width) / 2)
    return image_ops.resize(pixels, rows, columns, resample, (left, upper, left + width, upper + height))


def _covering(pixels: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """(height, width) in the image's ratio: one as asked, the other not less, rounded down as in torchvision."""
    old_height, old_width = pixels.shape[:2]
    if height / old_height >= width / old_width:
        return height, int(height * old_width / old_height)
    return int(width * old_height / old_width), width


def height_width(size: Size) -> tuple[int, int]:
    """Spells a size out as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
