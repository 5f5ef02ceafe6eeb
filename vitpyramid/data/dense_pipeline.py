"""Batches of images with boxes, masks or label maps, on canvases of a few fixed sizes; order as in `pipeline`."""

import dataclasses
import functools

import numpy as np

from vitpyramid.data import augment
from vitpyramid.data import dense_transforms as transforms
from vitpyramid.data.annotated import Annotated
from vitpyramid.data.annotations import IGNORED, Example, decode_mask, label_map_of
from vitpyramid.data.dense_transforms import Resize, Size, SizeCrop
from vitpyramid.data.order import Grouped, train_order
from vitpyramid.data.pipeline import Batch, BatchIterator, EvalBatches, eval_batches, train_stream

_MULTIPLE = 32  # of which the sides of canvases are that images choose themselves


@dataclasses.dataclass(frozen=True)
class Canvases:
    """What canvas each image of a split stands on; rows of a batch have one canvas.

    Attributes:
      sizes: (height, width) of each canvas.
      groups: index of each image's canvas, int64 [n].
    """

    sizes: tuple[Size, ...]
    groups: np.ndarray

    def of(self, index: int) -> Size:
        """The canvas of an image."""
        return self.sizes[self.groups[index]]


@dataclasses.dataclass(frozen=True)
class View:
    """What becomes of every image: `resize`, `interpolation`, `flip` as the config has them, the canvases, and of half
    of the images with boxes the part that is learned."""

    resize: Resize
    interpolation: str
    flip: float
    placed: Canvases
    part: SizeCrop | None = None


def train_resize(data) -> Resize:
    """How `config.data` has training images resized."""
    return Resize(data.resize, tuple(data.short_side), data.long_side, data.short_side_range, tuple(data.scale_range))


def eval_resize(data) -> Resize:
    """How `config.data` has images resized for evaluation."""
    return Resize(data.resize, (data.eval_short_side,), data.long_side, align=data.eval_align)


def canvases(source: Annotated, choices: tuple[Size, ...], resize: Resize) -> Canvases:
    """The canvas of each image: of those it fits on in its largest size the one of fewest pixels, then the first.

    Args:
      choices: (height, width) each; (): the image's own size, rounded up to multiples of 32.

    Raises:
      ValueError: an image fits on none.
    """
    largest = resize.largest()
    sizes, images = np.unique(source.sizes(), axis=0, return_inverse=True)
    fitting = [largest.aligned((height, width)) for height, width in sizes.tolist()]
    if not choices:
        choices = tuple(sorted({tuple(-(-side // _MULTIPLE) * _MULTIPLE for side in size) for size in fitting}))
    ordered = sorted(choices, key=lambda size: size[0] * size[1])  # stable
    chosen = []
    for (height, width), old in zip(fitting, sizes.tolist(), strict=True):
        fits = [number for number, size in enumerate(ordered) if height <= size[0] and width <= size[1]]
        if not fits:
            raise ValueError(
                f"data.canvas / data.eval_canvas: an image of {old[0]} x {old[1]} becomes up to {height} x {width}, "
                f"expected one of {', '.join(f'{h} x {w}' for h, w in choices)} to hold it."
            )
        chosen.append(fits[0])
    used, groups = np.unique(np.array(chosen)[images.ravel()], return_inverse=True)
    return Canvases(tuple(ordered[number] for number in used), groups)


def make_train(
    config, source: Annotated, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
    """Returns the endless training stream of one host, from batch `start_step` on.

    All that `pipeline.make_train` promises holds. Where there are several canvases, all rows of a batch have the same
    one, and batches are formed as `order.Grouped` says.

    Args:
      config: reads `seed`, `batch_size` (global) and, in `data`, `resize`, `short_side`, `short_side_range`,
        `long_side`, `scale_range`, `interpolation`, `flip`, `canvas`, `on_corrupt`, `threads`, `workers`; for boxes
        `max_boxes`, `masks`, `crop_short_side`, `crop_side`; for label maps `crop`, `cat_max_ratio`, `photometric`.
      source: see `open_annotated`; opened with `training`.
      start_step, process_index, process_count: as in `pipeline.make_train`.

    Returns:
      An iterator, with `close()`, of batches of b = batch_size // process_count rows on a canvas H x W:
      "image": uint8 [b, H, W, 3], 0 beyond the image, and "size": int32 [b, 2], height and width of what is not.
      With boxes "boxes": float32 [b, G, 4] as x1 y1 x2 y2 on the canvas, "labels": int32 [b, G], "valid":
      bool [b, G], where G = `max_boxes`, and "dropped": int32 [b], objects beyond these; with masks, "masks": uint8
      [b, G, H, ceil(W / 8)], eight pixels a byte as `np.packbits` has them. With label maps "label": uint8 [b, H, W],
      255 where nothing is known.
      With `on_corrupt` "skip" also "skipped": bool [b].

    Raises:
      ValueError: see `canvases`; `batch_size` is no multiple of `process_count`.
      UnreadableError: from the iterator, as in `pipeline.make_train`.
    """
    data = config.data
    resize, choices = train_resize(data), _sizes(data.canvas)
    if source.task == "segment" and data.crop:
        if len(choices) != 1:
            raise ValueError(f"data.canvas: {choices}: expected one canvas with data.crop = True.")
        placed = Canvases(choices, np.zeros(len(source), np.int64))
    else:
        placed = canvases(source, choices, resize)
    part = SizeCrop(data.crop_short_side, data.crop_side) if data.crop_short_side else None
    view = View(resize, data.interpolation, data.flip, placed, part)
    if source.task == "detect":
        row = functools.partial(_boxes_row, view=view, slots=data.max_boxes, masks=data.masks)
    else:
        keys = {"crop": data.crop, "cat_max_ratio": data.cat_max_ratio, "photometric": data.photometric}
        row = functools.partial(_labels_row, view=view, classes=len(source.categories), **keys)
    order = train_order(len(source), config.seed, config.batch_size, 1)
    if len(placed.sizes) > 1:
        order = Grouped(order, placed.groups, config.batch_size)
    return train_stream(config, source, order, row, start_step, process_index, process_count, placed.groups)


def make_eval(config, source: Annotated, process_index: int = 0, process_count: int = 1) -> EvalBatches:
    """Returns one host's share of a split, every example exactly once over all hosts, one canvas after the other.

    Args:
      config: reads `eval.batch_size` (global) and, in `data`, `resize`, `eval_short_side`, `long_side`, `eval_align`,
        `interpolation`, `eval_canvas`, `on_corrupt`, `threads` and `workers`.
      source: see `open_annotated`.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      A sized iterable, to be walked as often as wanted, of batches of b = eval.batch_size // process_count rows:
      "image": uint8 [b, H, W, 3], "size": int32 [b, 2], height and width of the resized image on the canvas,
      "original_size": int32 [b, 2], "scale": float32 [b, 2], pixels of the canvas per original one, down and across,
      "index": int32 [b], position in the source, and "mask": bool [b], False for rows that only fill up: these are
      black, with the canvas for size, and index -1. With `on_corrupt` "skip" also "skipped": bool [b].

    Raises:
      ValueError: as `make_train`.
      UnreadableError: from the iterator, as in `pipeline.make_eval`.
    """
    resize = eval_resize(config.data)
    placed = canvases(source, _sizes(config.data.eval_canvas), resize)
    row = functools.partial(_eval_row, view=View(resize, config.data.interpolation, 0.0, placed))
    blank = functools.partial(_blank_row, placed=placed)
    return eval_batches(config, source, row, blank, process_index, process_count, placed.groups)


def _sizes(choices) -> tuple[Size, ...]:
    return tuple((int(height), int(width)) for height, width in choices)


def _pixels(example: Example) -> np.ndarray:
    """The image, uint8 [h, w, 3].

    Raises:
      ValueError: it cannot be read, or is not as large as the annotations say (`SizeMismatchError` of detectron2).
    """
    pixels = np.asarray(augment.decode(example.image))
    if example.size is not None and pixels.shape[:2] != example.size:
        raise ValueError(f"an image of {pixels.shape[:2]} pixels, the annotations say {example.size}")
    return pixels


def _boxes_row(example: Example, index: int, rng: np.random.Generator, *, view: View, slots: int, masks: bool) -> Batch:
    pixels, canvas, resize = _pixels(example), view.placed.of(index), view.resize
    old = first = pixels.shape[:2]
    # Crowds teach nothing: no anchor is ignored for them in the papers' mmdetection, and detectron2 drops them.
    objects = np.flatnonzero(~example.crowd)
    boxes, part = example.boxes[objects], (slice(None), slice(None))
    if view.part and rng.random() < 0.5:
        first, part = view.part.draw(old, resize.rule, rng)
        pixels = transforms.resize_image(pixels, first, view.interpolation)[part]
        boxes, kept = transforms.crop_boxes(transforms.resize_boxes(boxes, old, first), part)
        objects, boxes = objects[kept], boxes[kept]
        resize = resize.fitting(pixels.shape[:2], canvas)  # an upright part of a wide image has a wide one's canvas
    whole = pixels.shape[:2]
    new = resize.draw(rng).keeping(whole)
    pixels = transforms.resize_image(pixels, new, view.interpolation)
    taught = objects[:slots]
    boxes = transforms.resize_boxes(boxes[:slots], whole, new)
    mirrored = rng.random() < view.flip
    if mirrored:
        pixels, boxes = pixels[:, ::-1], transforms.flip_boxes(boxes, new[1])
    empty = slots - len(taught)
    row = {
        "image": transforms.pad(pixels, canvas),
        "size": np.array(new, np.int32),
        "boxes": np.pad(boxes, ((0, empty), (0, 0))),
        "labels": np.pad(example.labels[taught].astype(np.int32), (0, empty)),
        "valid": np.arange(slots) < len(taught),
        "dropped": np.int32(len(objects) - len(taught)),
    }
    if masks:
        packed = np.zeros((slots, canvas[0], -(-canvas[1] // 8)), np.uint8)
        for slot, number in enumerate(taught):
            mask = transforms.resize_nearest(decode_mask(example.masks[number], *old), first, view.interpolation)
            mask = transforms.resize_nearest(mask[part], new, view.interpolation)
            mask = mask[:, ::-1] if mirrored else mask
            packed[slot] = np.packbits(transforms.pad(mask, canvas), axis=-1)
        row["masks"] = packed
    return row


def _labels_row(
    example: Example,
    index: int,
    rng: np.random.Generator,
    *,
    view: View,
    crop: bool,
    cat_max_ratio: float,
    photometric: bool,
    classes: int,
) -> Batch:
    pixels, labels, canvas = _pixels(example), label_map_of(example, classes), view.placed.of(index)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f"a label map of {labels.shape} pixels, expected the image's {pixels.shape[:2]}")
    new = view.resize.draw(rng).keeping(labels.shape)
    pixels = transforms.resize_image(pixels, new, view.interpolation)
    labels = transforms.resize_nearest(labels, new, view.interpolation)
    if crop:
        window = transforms.crop_window(labels, canvas, cat_max_ratio, rng)
        pixels, labels = pixels[window], labels[window]
    if rng.random() < view.flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if photometric:
        pixels = transforms.photometric_distortion(pixels, rng)
    size = np.array(labels.shape, np.int32)
    return {
        "image": transforms.pad(pixels, canvas),
        "size": size,
        "label": transforms.pad(labels, canvas, IGNORED),
    }


def _eval_row(example: Example, index: int, *, view: View) -> Batch:
    pixels = _pixels(example)
    old = pixels.shape[:2]
    new = view.resize.aligned(old)
    # Two steps, as in PVT's `AlignResize`, where there is something to align.
    pixels = transforms.resize_image(pixels, view.resize.keeping(old), view.interpolation)
    pixels = transforms.resize_image(pixels, new, view.interpolation)
    return {
        "image": transforms.pad(pixels, view.placed.of(index)),
        "size": np.array(new, np.int32),
        "original_size": np.array(old, np.int32),
        "scale": transforms.scale_factors(old, new),
        "index": np.int32(index),
    }


def _blank_row(index: int, *, placed: Canvases) -> Batch:
    size = placed.of(index)
    return {
        "image": np.zeros((*size, 3), np.uint8),
        "size": np.array(size, np.int32),
        "original_size": np.array(size, np.int32),
        "scale": np.ones(2, np.float32),
        "index": np.int32(-1),
    }
