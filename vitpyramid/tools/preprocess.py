"""Images as a network's evaluation sees them: turned, resized, cut, normalised."""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vitpyramid.data.augment import Size, decode, eval_crop, height_width, to_rgb
from vitpyramid.files import as_path, in_bucket
from vitpyramid.heads.registry import DENSE
from vitpyramid.models.backbone import Variant
from vitpyramid.models.registry import get_variant, list_models
from vitpyramid.tools.classes import read_meta

Picture = str | os.PathLike | Image.Image | np.ndarray


def preprocess(source: str | os.PathLike, size: Size | None = None) -> Callable[..., np.ndarray]:
    """What a model, or a run, does to images before it sees them in an evaluation.

        prepare = vitpyramid.preprocess("pvt_small")
        logits = model.apply(variables, prepare("photo.jpg"))

    Args:
      source: one of `list_models()`: as its authors evaluated it; a work directory or folder of converted weights, also
        gs://...: as the run did.
      size: side, or height and width, of the result in pixels; None: the model's or the run's.

    Returns:
      A function of an image, or of several in a list, that gives normalised float32 `[B, height, width, 3]`, where B is
      1 for a single image. An image is a path, a `PIL.Image`, or an array of uint8 `[H, W]`, `[H, W, 1]`, `[H, W, 3]`
      or `[H, W, 4]` (alpha is dropped); arrays `[B, H, W, 3]` are several. Paths and PIL images are turned as their
      EXIF data say. It raises `ValueError` for what is no such image, `OSError` for a file that cannot be read.

    Raises:
      ValueError: `source` is neither a model nor such a folder.
    """
    if source in list_models():
        network = {"name": source, "image_size": get_variant(source).model.image_size}
        variant = get_variant(source)
    else:
        network = read_meta(source)["network"]
        variant = evaluation_of(os.fspath(source), network["name"])
    return functools.partial(_prepare, size=height_width(size or network["image_size"]), variant=variant)


def _prepare(images: Picture | Sequence[Picture], *, size: tuple[int, int], variant: Variant) -> np.ndarray:
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    pixels = np.stack([_cut(_open(image), size, variant) for image in (images if several else [images])])
    mean, std = np.float32(variant.mean), np.float32(variant.std)
    return (pixels.astype(np.float32) / 255 - mean) / std


def _open(image: Picture) -> Image.Image:
    """An upright RGB image."""
    if isinstance(image, (str, os.PathLike)):
        return upright(Path(image).expanduser().read_bytes())
    if isinstance(image, Image.Image):
        image.load()
        return _turned(to_rgb(image), _orientation(image))
    array = np.asarray(image)
    channels = array.shape[2:] if array.ndim == 3 else (1,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"an image of {array.dtype} and shape {array.shape}: expected a path, a PIL image, or uint8 of shape "
            "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    array = array.reshape(*array.shape[:2], -1)[:, :, :3]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def read_image(path: Path, size: tuple[int, int], variant: Variant) -> np.ndarray | str:
    """uint8 [*size, 3] pixels of an image as the network should see it, or why it cannot be read."""
    image = open_image(path)
    return image if isinstance(image, str) else _cut(image, size, variant)


def open_image(path: Path) -> Image.Image | str:
    """An image file as `upright` gives it, or why it cannot be read."""
    try:
        return upright(path.read_bytes())
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, Image.DecompressionBombError) as error:
        return str(error)


def upright(data: bytes) -> Image.Image:
    """An image file as RGB, turned as its EXIF data say. Raises `ValueError` if it is no readable image."""
    return _turned(decode(data), _orientation(Image.open(io.BytesIO(data))))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    image.info.clear()  # exif_transpose() would encode all EXIF data anew, and fails if some have a wrong type
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFF images by itself while it decodes them.
    return 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)


def _cut(image: Image.Image, size: tuple[int, int], variant: Variant) -> np.ndarray:
    resample = Image.Resampling[variant.interpolation.upper()]
    return np.asarray(eval_crop(image, size, variant.crop, resample))


def evaluation_of(checkpoint: str, name: str) -> Variant:
    """The network called `name`, with crop, filter, mean and std of the run whose work directory `checkpoint` may be.

    Raises:
      ValueError: it is for dense prediction, which sees images otherwise.
    """
    if name in DENSE:
        raise ValueError(f"{name}: expected a classifier, this is for dense prediction, as vitpyramid.tools.predict is")
    variant = get_variant(name)
    file = (as_path(checkpoint) if in_bucket(checkpoint) else Path(checkpoint).expanduser()) / "config.json"
    if not file.is_file():
        return variant
    data = json.loads(file.read_text())["data"]
    return dataclasses.replace(
        variant,
        crop=data["eval_crop"],
        interpolation=data.get("eval_interpolation", variant.interpolation),
        mean=tuple(data.get("mean", ())) or variant.mean,
        std=tuple(data.get("std", ())) or variant.std,
    )
