"""What is done to images with boxes, masks and label maps: resize, flip, crop, distort colours.

As in mmdetection 2.13, mmsegmentation 0.13 (on mmcv 1.3) and detectron2. Sizes are (height, width) in pixels, images
uint8 [H, W, 3] in RGB, boxes float [n, 4] as x1 y1 x2 y2. Randomness comes from the generator that is passed in.
"""

import dataclasses

import numpy as np
from PIL import Image

from vitpyramid.data import image_ops
from vitpyramid.data.annotations import IGNORED
from vitpyramid.data.opencv import resize_linear

Size = tuple[int, int]
RULES = ("mmdet", "detectron2", "detr")
INTERPOLATIONS = ("bilinear", "opencv")
_CROPS = 10  # that are drawn anew


@dataclasses.dataclass(frozen=True)
class Resize:
    """How large an image becomes.

    Attributes:
      rule: "mmdet" is mmcv's `rescale_size`, of mmdetection and mmsegmentation; "detectron2" its `ResizeShortestEdge`;
        "detr" its `get_size_with_aspect_ratio`. They round differently.
      short_sides: what the shorter side is to become, one of these.
      in_range: any whole number from the smallest to the largest of them (`multiscale_mode="range"` of mmdetection,
        `sample_style="range"` of detectron2).
      long_side: what the longer side may not exceed.
      ratio_range: both sides are multiplied by a factor uniform in this range, and rounded down (`ratio_range` of
        mmsegmentation).
      align: both sides of the result are rounded up to multiples of this (`AlignResize` of PVT's segmentation).
    """

    rule: str
    short_sides: tuple[int, ...]
    long_side: int
    in_range: bool = False
    ratio_range: tuple[float, float] = (1.0, 1.0)
    align: int = 1

    def draw(self, rng: np.random.Generator) -> "Resize":
        """With one short side, as drawn, and a factor of 1."""
        if self.in_range:
            short = int(rng.integers(min(self.short_sides), max(self.short_sides), endpoint=True))
        else:
            short = self.short_sides[rng.integers(len(self.short_sides))]
        factor = rng.uniform(*self.ratio_range) if self.ratio_range != (1.0, 1.0) else 1.0
        return self._scaled(short, factor)

    def fitting(self, size: Size, canvas: Size) -> "Resize":
        """With those short sides alone with which an image fits on a canvas; if with none, the largest smaller one."""
        least, most = min(self.short_sides), max(self.short_sides)

        def fits(short: int) -> bool:
            height, width = dataclasses.replace(self, short_sides=(short,)).largest().keeping(size)
            return height <= canvas[0] and width <= canvas[1]

        sides = range(least, most + 1) if self.in_range else self.short_sides
        fitting = tuple(filter(fits, sides)) or (next(filter(fits, range(least, 0, -1)), 1),)
        return dataclasses.replace(self, short_sides=fitting)

    def largest(self) -> "Resize":
        """With the largest sides that can be drawn."""
        return self._scaled(max(self.short_sides), self.ratio_range[1])

    def _scaled(self, short: int, factor: float) -> "Resize":
        long = int(self.long_side * factor)
        return dataclasses.replace(
            self, short_sides=(int(short * factor),), long_side=long, in_range=False, ratio_range=(1.0, 1.0)
        )

    def keeping(self, size: Size) -> Size:
        """The new size, ratio kept as far as whole numbers go; of a `Resize` with one short side."""
        (short,) = self.short_sides
        return {"mmdet": _mmcv_size, "detectron2": _detectron2_size, "detr": _detr_size}[self.rule](
            *size, short, self.long_side
        )

    def aligned(self, size: Size) -> Size:
        """`keeping`, rounded up to multiples of `align`."""
        height, width = (-(-side // self.align) * self.align for side in self.keeping(size))
        return height, width


@dataclasses.dataclass(frozen=True)
class SizeCrop:
    """A random part of an image before it is resized: what DETR's `make_coco_transforms` does to half of the images.

    Attributes:
      short_sides: what the image's shorter side becomes first, one of these, however long the other.
      sides: least and largest height and width of the part; no more than the image then has.
    """

    short_sides: tuple[int, ...]
    sides: tuple[int, int]

    def draw(self, size: Size, rule: str, rng: np.random.Generator) -> tuple[Size, tuple[slice, slice]]:
        """The size that an image becomes, by a `rule` of `Resize`, and the part of that."""
        short = self.short_sides[rng.integers(len(self.short_sides))]
        new = Resize(rule, (short,), short * max(size)).keeping(size)
        least, most = self.sides
        width, height = (int(rng.integers(min(least, side), min(most, side), endpoint=True)) for side in new[::-1])
        top, left = (int(rng.integers(space, endpoint=True)) for space in (new[0] - height, new[1] - width))
        return new, (slice(top, top + height), slice(left, left + width))


def _mmcv_size(height: int, width: int, short: int, long: int) -> Size:
    # mmcv takes the larger of the two for the longer side, whichever was meant.
    long, short = max(long, short), min(long, short)
    factor = min(long / max(height, width), short / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def _detectron2_size(height: int, width: int, short: int, long: int) -> Size:
    scale = short / min(height, width)
    new = (short, scale * width) if height < width else (scale * height, short)
    if max(new) > long:
        scale = long / max(new)
        new = (new[0] * scale, new[1] * scale)
    return int(new[0] + 0.5), int(new[1] + 0.5)


def _detr_size(height: int, width: int, short: int, long: int) -> Size:
    smaller, larger = min(height, width), max(height, width)
    if larger / smaller * short > long:
        short = round(long * smaller / larger)
    if smaller == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


def resize_image(image: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Bilinear: "bilinear" antialiased as Pillow and detectron2 do, "opencv" as OpenCV and mmdetection do."""
    if image.shape[:2] == size:
        return image
    if interpolation == "opencv":
        return resize_linear(image, size)
    return np.asarray(image_ops.resize(image, *size, Image.Resampling.BILINEAR))


def resize_nearest(maps: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Of masks or label maps [..., H, W], the pixel that Pillow ("bilinear") or OpenCV ("opencv") takes."""
    if maps.shape[-2:] == size:
        return maps
    shift = 0.0 if interpolation == "opencv" else 0.5
    rows, columns = (
        np.minimum(np.floor((np.arange(new) + shift) * (1.0 / (new / old))).astype(np.int64), old - 1)
        for new, old in zip(size, maps.shape[-2:], strict=True)
    )
    return maps.take(columns, axis=-1).take(rows, axis=-2)


def scale_factors(size: Size, new: Size) -> np.ndarray:
    """New pixels per old one, down and across; float32, as in mmdetection."""
    return np.array([new[0] / size[0], new[1] / size[1]], np.float32)


def resize_boxes(boxes: np.ndarray, size: Size, new: Size) -> np.ndarray:
    """Boxes of an image in that image resized, cut at its edges: float32 [n, 4]."""
    down, across = scale_factors(size, new)
    boxes = boxes.astype(np.float32) * np.array([across, down, across, down])
    return np.clip(boxes, 0, np.array([new[1], new[0], new[1], new[0]], np.float32))


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes of an image in that image mirrored left and right."""
    x1, y1, x2, y2 = boxes.T
    return np.stack([width - x2, y1, width - x1, y2], axis=-1)


def crop_boxes(boxes: np.ndarray, part: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of an image in a part of it, cut at its edges; and bool [n], which of them have area there."""
    (top, bottom), (left, right) = ((side.start, side.stop) for side in part)
    corner, far = (np.array([x, y, x, y], boxes.dtype) for x, y in ((left, top), (right - left, bottom - top)))
    boxes = np.clip(boxes - corner, 0, far)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def crop_window(
    label_map: np.ndarray, size: Size, cat_max_ratio: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Draws a window of `size`, or less where the image is smaller: mmsegmentation's `RandomCrop`.

    It is drawn anew, ten times at most, until it shows two classes, and none of them in `cat_max_ratio` or more of the
    pixels of which the label map says something.
    """

    def draw() -> tuple[slice, slice]:
        room = [max(have - want, 0) for have, want in zip(label_map.shape, size, strict=True)]
        top, left = (int(rng.integers(space, endpoint=True)) for space in room)
        return slice(top, top + size[0]), slice(left, left + size[1])

    window = draw()
    for _ in range(_CROPS if cat_max_ratio < 1 else 0):
        counts = np.bincount(label_map[window].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio:
            break
        window = draw()
    return window


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmsegmentation's `PhotoMetricDistortion`: each step with a probability of a half.

    Brightness +-32 levels, contrast 0.5 to 1.5 (before or after the two that follow), saturation 0.5 to 1.5, hue +-18
    of 180. Hue and saturation change as floating point numbers, so that levels may differ by a few from OpenCV's, which
    are rounded to 8 bits in between.
    """

    def levels(values: np.ndarray) -> np.ndarray:
        return np.clip(values, 0, 255).astype(np.uint8)

    def contrast(image: np.ndarray) -> np.ndarray:
        return levels(image * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else image

    if rng.integers(2):
        image = levels(image + np.float32(rng.uniform(-32, 32)))
    first = bool(rng.integers(2))
    if first:
        image = contrast(image)
    saturation = rng.uniform(0.5, 1.5) if rng.integers(2) else 1.0
    hue = int(rng.integers(-18, 18)) if rng.integers(2) else 0
    if saturation != 1 or hue:
        image = _turn_colours(image, saturation, hue)
    return image if first else contrast(image)


def _turn_colours(image: np.ndarray, saturation: float, hue: int) -> np.ndarray:
    """Saturation times a factor, up to 1, and hue turned by `hue` of 180, of HSV."""
    rgb = image.astype(np.float32)
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    span = value - low
    safe = np.where(span > 0, span, 1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sixths = np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = np.where(value == red, (green - blue) / safe, sixths) + hue / 30
    chroma = np.minimum(span * np.float32(saturation), value)
    # Of each band, its distance from the value: 0 within a sixth of its own hue, then up to the chroma.
    out = [value - chroma * np.clip(np.abs((sixths - own + 3) % 6 - 3) - 1, 0, 1) for own in (0, 2, 4)]
    return np.rint(np.stack(out, axis=-1)).astype(np.uint8)


def pad(array: np.ndarray, size: Size, value: int = 0) -> np.ndarray:
    """An image or map [H, W, ...] at the upper left of a canvas.

    Raises:
      ValueError: it does not fit.
    """
    if array.shape[0] > size[0] or array.shape[1] > size[1]:
        raise ValueError(f"data.canvas: an image of {array.shape[:2]} does not fit into {size}")
    canvas = np.full((*size, *array.shape[2:]), value, array.dtype)
    canvas[: array.shape[0], : array.shape[1]] = array
    return canvas
