"""The objects of all images of a split: which of their annotations can teach, and what is wrong with the others."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vitpyramid.data.annotations import Findings, Segmentation, is_polygon

_SMALLEST_SIDE = 32  # of an image that mmdetection trains on


@dataclasses.dataclass(frozen=True)
class Objects:
    """Boxes of n images, m in all, in the order of the images.

    Attributes:
      starts: int64 [n + 1]; those of image i are [starts[i], starts[i + 1]).
      boxes: float64 [m, 4], x1 y1 x2 y2 in pixels.
      labels: int64 [m].
      crowd: bool [m].
      masks: of each box; None: without masks.
    """

    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    masks: tuple[Segmentation, ...] | None

    def only(self, images: np.ndarray) -> "Objects":
        """Those of some images, in the order given."""
        counts = np.diff(self.starts)[images]
        starts = np.concatenate([[0], np.cumsum(counts)])
        rows = np.repeat(self.starts[:-1][images] - starts[:-1], counts) + np.arange(starts[-1])
        masks = None if self.masks is None else tuple(self.masks[row] for row in rows)
        return Objects(starts, self.boxes[rows], self.labels[rows], self.crowd[rows], masks)

    def of(self, index: int) -> dict:
        """`boxes`, `labels`, `crowd` and `masks` of an image."""
        rows = slice(self.starts[index], self.starts[index + 1])
        masks = () if self.masks is None else self.masks[rows]
        return {"boxes": self.boxes[rows], "labels": self.labels[rows], "crowd": self.crowd[rows], "masks": masks}


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Annotations of a split as they are found, m of them, in any order.

    Attributes:
      images: int64 [m], index of the image.
      boxes: float64 [m, 4], x, y, width, height in pixels; NaN where there are no four numbers.
      areas: float64 [m].
      labels: int64 [m], -1 for a category that the data set does not list.
      crowd, ignored: bool [m].
      masks: `segmentation` of each, None where there is none.
      place: names an annotation in messages.
    """

    images: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    masks: Sequence[Segmentation | None]
    place: Callable[[int], str]


def usable_objects(found: Annotations, sizes: np.ndarray, findings: Findings, with_masks: bool) -> Objects:
    """Leaves out what teaches nothing, as mmdetection's `CocoDataset._parse_ann_info` does, and counts it.

    Of masks mmdetection asks nothing; here, as in detectron2, what has none that can be drawn is left out with its box,
    and polygons of less than three points are passed over.

    Args:
      found: the annotations.
      sizes: int [n, 2], height and width of the images.
      findings: gets a count of each kind.
      with_masks: whether masks are asked for.

    Raises:
      ValueError: the boxes are not x, y, width, height in pixels.
    """
    height, width = sizes[found.images].T.astype(np.float64)
    x, y, w, h = found.boxes.T
    _check_format(found, height, width)
    with np.errstate(invalid="ignore"):
        reasons = {
            "annotations marked to be ignored; left out": found.ignored,
            "boxes that are not four numbers; left out": ~np.isfinite(found.boxes).all(axis=1),
            "boxes outside of their image, or without area; left out": (
                (np.minimum(x + w, width) <= np.maximum(x, 0)) | (np.minimum(y + h, height) <= np.maximum(y, 0))
            ),
            "objects without area; left out": ~(found.areas > 0),
            "boxes less than a pixel wide or high; left out": (w < 1) | (h < 1),
            "annotations of unknown categories; left out": found.labels < 0,
        }
        beyond = (x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1)
    usable = np.ones(len(found.images), bool)
    for kind, concerned in reasons.items():
        for number in np.flatnonzero(concerned & usable):
            findings.add(kind, found.place(number))
        usable &= ~concerned
    if with_masks:
        for number in np.flatnonzero(usable & ~found.crowd):
            reason = _unusable_mask(found.masks[number], sizes[found.images[number]].tolist())
            if reason:
                findings.add(reason, found.place(number))
                usable[number] = not reason.endswith("left out")
    for number in np.flatnonzero(usable & beyond):
        findings.add("boxes that reach beyond their image; cut at its edges", found.place(number))
    for number in np.flatnonzero(usable & found.crowd):
        findings.add("boxes around crowds; not learned", found.place(number))
    kept = np.flatnonzero(usable)
    kept = kept[np.argsort(found.images[kept], kind="stable")]
    corners = found.boxes[kept]
    corners[:, 2:] += corners[:, :2]
    starts = np.searchsorted(found.images[kept], np.arange(len(sizes) + 1))
    masks = tuple(_compact(found.masks[number]) for number in kept) if with_masks else None
    return Objects(starts, corners, found.labels[kept], found.crowd[kept], masks)


def trained_images(
    found: Annotations, objects: Objects, sizes: np.ndarray, places: Sequence[str], slots: int, findings: Findings
) -> np.ndarray:
    """The images that mmdetection trains on: with an annotation of a known category, and of 32 pixels at least.

    An image whose annotations are all crowds, or left out, is one of them: it teaches what is no object.

    Args:
      found, objects: see `usable_objects`.
      sizes: int [n, 2], height and width.
      places: name the images in messages.
      slots: objects of an image that are learned; images with more are counted.
      findings: gets a count of each kind.

    Returns:
      bool [n].
    """
    annotated = np.bincount(found.images[found.labels >= 0], minlength=len(sizes)) > 0
    large = sizes.min(axis=1) >= _SMALLEST_SIDE
    kept = annotated & large
    objects_each = np.diff(np.concatenate([[0], np.cumsum(~objects.crowd)])[objects.starts])
    for kind, concerned in {
        "images without annotations; not learned": ~annotated,
        f"images with a side of less than {_SMALLEST_SIDE} pixels; not learned": annotated & ~large,
        f"images with more than data.max_boxes = {slots} objects; the first ones are learned": (
            kept & (objects_each > slots)
        ),
    }.items():
        for index in np.flatnonzero(concerned):
            findings.add(kind, places[index])
    return kept


def _check_format(found: Annotations, height: np.ndarray, width: np.ndarray) -> None:
    boxes = np.isfinite(found.boxes).all(axis=1) & ~found.ignored
    x, y, w, h = found.boxes[boxes].T
    if not len(x):
        return
    expected = "expected x, y, width, height in pixels, as in COCO's JSON"
    if (found.boxes[boxes] <= 1).all() and width[boxes].min() > 1:
        raise ValueError(f"all numbers of all boxes are 1 or less, as if they were shares of the image: {expected}.")
    outside = (x + w > width[boxes] + 1) | (y + h > height[boxes] + 1)
    corners = (w > x) & (h > y) & (w <= width[boxes] + 1) & (h <= height[boxes] + 1)
    if corners.all() and outside.mean() > 0.2:
        raise ValueError(
            f"boxes look like x1, y1, x2, y2, and {outside.sum()} of them reach beyond images: {expected}."
        )


def _unusable_mask(segmentation: Segmentation | None, size: list[int]) -> str | None:
    """What is wrong with a mask; ends with "left out" where it is of no use."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if list(segmentation.get("size", ())) != size:
            return "masks of another size than their image; left out"
        if not isinstance(counts, (str, bytes)) and (not isinstance(counts, list) or sum(counts) != size[0] * size[1]):
            return "run-length masks that do not fill their image; left out"
    elif not isinstance(segmentation, list) or not any(is_polygon(polygon) for polygon in segmentation):
        return "masks without a polygon of three points; left out"
    elif not all(is_polygon(polygon) for polygon in segmentation):
        return "masks with polygons of less than three points, which are passed over"
    return None


def _compact(segmentation: Segmentation | None) -> Segmentation:
    """Polygons as arrays: lists of numbers would take eight times the memory."""
    if isinstance(segmentation, list):
        return [np.array(polygon, np.float64) for polygon in segmentation if is_polygon(polygon)]
    return segmentation or []
