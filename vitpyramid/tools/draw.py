"""Boxes with names, masks and label maps on images."""

import colorsys
import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitpyramid.data.annotations import IGNORED

_SEEN_THROUGH = 0.5  # share of the image where a mask or a class lies on it


@functools.cache
def palette() -> np.ndarray:
    """Colours of 256 classes, uint8 `[256, 3]`: 0 is black, the others have hues in steps of the golden section."""
    hues = (number * 0.618034 % 1 for number in range(1, 256))
    colours = [colorsys.hsv_to_rgb(hue, 1 - 0.4 * (i % 2), 1 - 0.3 * (i // 2 % 2)) for i, hue in enumerate(hues)]
    return np.rint(255 * np.array([(0.0, 0.0, 0.0), *colours])).astype(np.uint8)


def label_image(label_map: np.ndarray) -> Image.Image:
    """A label map, uint8 `[H, W]`, as an image with a palette: its levels are the labels."""
    image = Image.fromarray(label_map)
    image.putpalette(palette().tobytes())  # which makes a grey image one with a palette
    return image


def scaled(image: Image.Image, least: int, most: int = 2**31) -> tuple[Image.Image, float]:
    """An image enlarged by a whole factor, so that its shorter side has `least` pixels or more, or reduced, so that its
    longer one has `most`; and the factor."""
    factor = max(1, math.ceil(least / min(image.size)))
    if factor == 1 and max(image.size) > most:
        factor = most / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX), factor


def objects(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    masks: Sequence[np.ndarray] = (),
    factor: float = 1,
) -> Image.Image:
    """A copy of an image with boxes on it, each with a caption, in its class's colour; the last ones lie on top.

    Args:
      boxes: `[n, 4]`, x1 y1 x2 y2, in pixels of the image before it was scaled by `factor`.
      labels: classes from 0.
      masks: bool `[h, w]` of each box, or none, of the image before it was scaled.
    """
    colours = palette()[1 + np.asarray(labels, int) % 255]
    pixels = np.array(image)
    for mask, colour in zip(masks, colours, strict=False):
        where = _as_large(mask, image)
        pixels[where] = _SEEN_THROUGH * pixels[where] + (1 - _SEEN_THROUGH) * colour
    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), _font(image.size)
    width = max(1, round(min(image.size) / 300))
    boxes = np.asarray(boxes, float).reshape(-1, 4) * factor
    for box, colour in zip(boxes, colours, strict=True):
        draw.rectangle((*box[:2], *np.maximum(box[2:] - 1, box[:2])), outline=tuple(colour.tolist()), width=width)
    for (x, y, *_), colour, caption in zip(boxes, colours, map(printable, captions), strict=True):
        # Above the box, or inside of it where there is no room.
        wide, tall = font.getlength(caption) + 4, _line(font)
        left, top = min(x, max(image.width - wide, 0)), y - tall if y >= tall else y
        draw.rectangle((left, top, left + wide, top + tall), fill=tuple(colour.tolist()))
        draw.text((left + 2, top), caption, _readable(colour), font)
    return image


def label_map_on(image: Image.Image, label_map: np.ndarray) -> Image.Image:
    """A copy of an image in the colours of its classes, uint8 `[h, w]`; where these are `IGNORED` it stays as it is.

    The label map may be of the image before it was scaled.
    """
    labels, pixels = _as_large(label_map, image), np.asarray(image)
    mixed = _SEEN_THROUGH * pixels + (1 - _SEEN_THROUGH) * palette()[labels]
    return Image.fromarray(np.where((labels == IGNORED)[..., None], pixels, mixed).astype(np.uint8))


def _as_large(values: np.ndarray, image: Image.Image) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.NEAREST))


def with_legend(image: Image.Image, labels: Sequence[int], captions: Sequence[str]) -> Image.Image:
    """An image, and below it the colours of classes with captions, in as many lines as they need."""
    font = _font(image.size)
    line = _line(font) + 2
    places, x, y = [], 0, 0
    for caption in captions:
        wide = line + int(font.getlength(printable(caption))) + 8
        x, y = (0, y + line) if x and x + wide > image.width else (x, y)
        places.append((x, image.height + y))
        x += wide
    page = Image.new("RGB", (image.width, image.height + y + line), "white")
    page.paste(image)
    draw = ImageDraw.Draw(page)
    for label, caption, (x, y) in zip(labels, captions, places, strict=True):
        draw.rectangle((x + 2, y + 2, x + line - 3, y + line - 3), fill=tuple(palette()[label].tolist()))
        draw.text((x + line, y + 1), printable(caption), "black", font)
    return page


def printable(text: str) -> str:
    """A text in characters that the font of pictures may have."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _font(size: tuple[int, int]):
    return ImageFont.load_default(max(12, round(min(size) / 40)))


def _line(font) -> int:
    return int(font.getbbox("Ag")[3]) + 2


def _readable(colour: np.ndarray) -> str:
    return "black" if colour @ (0.299, 0.587, 0.114) > 110 else "white"
