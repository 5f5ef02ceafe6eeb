"""Images with boxes, masks or label maps: what a source of them gives, and annotations that cannot be right."""

import collections
import dataclasses
import io
import logging

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

log = logging.getLogger(__name__)
_SHOWN = 5  # places in a message
IGNORED = 255  # level of a label map that says nothing

# What a mask may be: polygons (x, y, x, y ... each), or COCO's run-length encoding, compressed or not.
Segmentation = list | dict


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and what is known of it; sizes are pixels of the image as it is in its file.

    Attributes:
      image: a PNG, JPEG ... file.
      size: (height, width) that the annotations state, None where they do not.
      boxes: float64 [n, 4], x1 y1 x2 y2.
      labels: int64 [n], indices of the source's categories.
      crowd: bool [n]: the box is around many objects, and teaches none.
      masks: of each box, where the source was opened with masks.
      label_map: where the source has label maps, the file of a grey or palette image; see `label_map_of`.
      zero_ignored: whether level 0 of the label map stands for nothing and k for class k - 1, as in ADE20K.
    """

    image: bytes
    size: tuple[int, int] | None = None
    boxes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4)))
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    masks: tuple[Segmentation, ...] = ()
    label_map: bytes | None = None
    zero_ignored: bool = False


class Findings:
    """Annotations that cannot be right, counted by kind, and places where the first ones are."""

    def __init__(self, name: str):
        """`name` begins each line that is logged: the data set and its split."""
        self._name = name
        self.counts: collections.Counter[str] = collections.Counter()
        self._places: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, place: str) -> None:
        """Counts one of a kind: what it is and, after a semicolon, what becomes of it."""
        self.counts[kind] += 1
        if len(self._places[kind]) < _SHOWN:
            self._places[kind].append(place)

    def log(self) -> None:
        """A line for each kind."""
        for kind, count in self.counts.items():
            places, more = ", ".join(self._places[kind]), count - len(self._places[kind])
            log.warning("%s: %d %s: %s%s", self._name, count, kind, places, f" and {more} more" if more else "")


def run_lengths(segmentation: Segmentation, height: int, width: int) -> dict:
    """COCO's compressed run-length encoding of a mask.

    Polygons of fewer than three points are passed over, as in detectron2; pycocotools would take the first one of two
    points for a box.

    Raises:
      ValueError: no polygon of at least three points, an odd number of coordinates, or another size than the image's.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != (height, width):
            raise ValueError(f"a mask of {segmentation['size']} pixels, expected the image's {[height, width]}")
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(segmentation, height, width)
        return segmentation
    polygons = [[float(number) for number in polygon] for polygon in segmentation if is_polygon(polygon)]
    if not polygons:
        raise ValueError("a mask without a polygon of at least three points")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def is_polygon(polygon) -> bool:
    """Whether it has at least three points, and both coordinates of each."""
    return len(polygon) >= 6 and len(polygon) % 2 == 0


def decode_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The pixels of a mask, uint8 [height, width] of 0 and 1; see `run_lengths`."""
    return coco_mask.decode(run_lengths(segmentation, height, width))


def label_map_of(example: Example, num_classes: int) -> np.ndarray:
    """The class of each pixel, `IGNORED` where there is none: uint8 [height, width] of the image as it is in its file.

    Raises:
      ValueError: the file is no image of one band of 8 bits, or has levels that are no class.
    """
    image = Image.open(io.BytesIO(example.label_map))
    if image.mode not in ("1", "L", "P"):
        raise ValueError(f"a label map of mode {image.mode}, expected 8 bits of grey, or a palette")
    labels = np.asarray(image).astype(np.uint8)
    if example.zero_ignored:
        labels = np.where(labels == IGNORED, labels, labels - np.uint8(1))  # 0 becomes 255
    unknown = np.unique(labels[(labels >= num_classes) & (labels != IGNORED)])
    if len(unknown):
        raise ValueError(f"a label map with class {unknown[0]}, expected fewer than {num_classes}, or {IGNORED}")
    return labels


def coco_annotation(number: int, image_id, category_id: int, box: np.ndarray, area: float, crowd: bool) -> dict:
    """An entry of `annotations` in COCO's JSON, without a mask; `box` is x1 y1 x2 y2."""
    x1, y1, x2, y2 = map(float, box)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": float(area),
        "iscrowd": int(crowd),
    }
