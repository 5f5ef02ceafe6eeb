"""Boxes with names, masks and label maps on images."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitpyramid.data.annotations import IGNORED

_SEEN_THROUGH = 0.5  # share of the image where a mask or a class lies on it


@functools.cache
def palette() -> np.ndarray:
    """Colours of 256 numbers, uint8 `[256, 3]`: PASCAL VOC's, in which neighbours differ most and 0 is black."""
    numbers, bits = np.arange(256), np.arange(8)
    channels = [((numbers[:, None] >> (3 * bits + channel)) & 1) << (7 - bits) for channel in range(3)]
    return np.stack([channel.sum(axis=1) for channel in channels], axis=1).astype(np.uint8)


def label_image(label_map: np.ndarray) -> Image.Image:
    """A label map, uint8 `[H, W]`, as an image with a palette: its levels are the labels."""
    image = Image.fromarray(label_map)
    image.putpalette(palette().tobytes())  # which makes a grey image one with a palette
    return image


def enlarged(image: Image.Image, least: int) -> tuple[Image.Image, int]:
    """An image whose shorter side has at least so many pixels, and the whole factor that it was enlarged by."""
    factor = max(1, math.ceil(least / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST), factor


def objects(
    image: Image.Image,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
    factor: int = 1,
) -> Image.Image:
    """A copy of an image with boxes on it, each with a caption, in its class's colour; the last ones lie on top.

    Args:
      boxes: `[n, 4]`, x1 y1 x2 y2, in pixels of the image before it was enlarged by `factor`.
      labels: classes from 0.
      masks: bool `[h, w]` of each, of the image before it was enlarged.
    """
    colours = palette()[1 + np.asarray(labels, int) % 255]
    pixels = np.asarray(image).copy()
    for mask, colour in zip(masks if masks is not None else (), colours, strict=False):
        where = mask.repeat(factor, axis=0).repeat(factor, axis=1)
        pixels[where] = _SEEN_THROUGH * pixels[where] + (1 - _SEEN_THROUGH) * colour
    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), _font(image.size)
    width = max(1, round(min(image.size) / 300))
    for box, colour in zip(np.asarray(boxes, float).reshape(-1, 4) * factor, colours, strict=True):
        draw.rectangle((*box[:2], *np.maximum(box[2:] - 1, box[:2])), outline=tuple(colour.tolist()), width=width)
    for box, colour, caption in zip(np.asarray(boxes, float).reshape(-1, 4) * factor, colours, captions, strict=True):
        # Above the box, or inside of it where there is no room.
        edge = font.getbbox(printable(caption))
        tall = edge[3] + 2
        left, top = min(box[0], max(image.width - edge[2] - 4, 0)), box[1] - tall if box[1] >= tall else box[1]
        draw.rectangle((left, top, left + edge[2] + 4, top + tall), fill=tuple(colour.tolist()))
        draw.text((left + 2, top), printable(caption), _readable(colour), font)
    return image


def label_map_on(image: Image.Image, label_map: np.ndarray, factor: int = 1) -> Image.Image:
    """A copy of an image in the colours of its classes, uint8 `[h, w]`; where these are `IGNORED` it stays as it is.

    `label_map` is of the image before it was enlarged by `factor`.
    """
    labels = label_map.repeat(factor, axis=0).repeat(factor, axis=1)[..., None]
    pixels = np.asarray(image)
    mixed = _SEEN_THROUGH * pixels + (1 - _SEEN_THROUGH) * palette()[labels[..., 0]]
    return Image.fromarray(np.where(labels == IGNORED, pixels, mixed).astype(np.uint8))


def with_legend(image: Image.Image, labels: Sequence[int], captions: Sequence[str]) -> Image.Image:
    """An image, and below it the colours of classes with captions, in as many lines as they need."""
    font = _font(image.size)
    line = font.getbbox("Ag")[3] + 4
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
    return ImageFont.load_default(max(10, round(min(size) / 40)))


def _readable(colour: np.ndarray) -> str:
    return "black" if colour @ (0.299, 0.587, 0.114) > 110 else "white"
