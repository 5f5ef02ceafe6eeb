"""Boxes out of prepared TFDS data sets such as `coco/2017`, which has no masks, and areas in whole pixels."""

import concurrent.futures
import dataclasses
import hashlib
import io
import logging
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vitpyramid.data import jpeg
from vitpyramid.data.annotations import Example, Findings, coco_annotation
from vitpyramid.data.objects import Annotations, Objects, trained_images, usable_objects
from vitpyramid.data.prepared import ArrayRecords, open_builder, open_examples
from vitpyramid.data.tfrecord import TFRecords, cache_folder
from vitpyramid.files import write_atomically
from vitpyramid.progress import with_progress

log = logging.getLogger(__name__)
_THREADS = 16  # that read records; more than the cores, for file systems that answer slowly
_COCO_CLASSES = 80
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids of COCO's JSON, up to 90

_UNREADABLE = (1, 1)  # size that stands for a record that cannot be read


@dataclasses.dataclass(frozen=True)
class PreparedBoxes:
    """Encoded images out of serialised TFDS examples, and their objects, which were read beforehand.

    Attributes:
      features: of the data set.
      examples: of the split.
      positions: int64 [n], where in `examples` each image is.
      image_ids: int64 [n].
      image_sizes: int32 [n, 2], height and width.
      objects: of the images.
      found: annotations of all `examples`.
      categories: id and name of each class.
    """

    features: tfds.features.FeaturesDict
    examples: ArrayRecords | TFRecords
    positions: np.ndarray
    image_ids: np.ndarray
    image_sizes: np.ndarray
    objects: Objects
    found: dict[str, np.ndarray]
    categories: tuple[tuple[int, str], ...]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Example:
        record = _parsed(self.features, self.examples[int(self.positions[index])])
        height, width = self.image_sizes[index].tolist()
        return Example(record["image"], (height, width), **self.objects.of(index))

    def where(self, index: int) -> str:
        """The record's file and place in it, for messages."""
        return self.examples.where(int(self.positions[index]))

    def sizes(self) -> np.ndarray:
        """Height and width of every image, int32 [n, 2]."""
        return self.image_sizes

    def ids(self) -> list[int]:
        """`image/id` of the data set, or else positions in the split."""
        return self.image_ids.tolist()

    def ground_truth(self) -> dict[str, Any]:
        """As in COCO's JSON, but for areas, which TFDS rounds: small, medium and large objects may trade places."""
        place = {position: index for index, position in enumerate(self.positions.tolist())}
        found, annotations = self.found, []
        corners = _pixels(found["boxes"], found["sizes"][found["images"]])
        for row, position in enumerate(found["images"].tolist()):
            if position in place and found["labels"][row] >= 0 and np.isfinite(corners[row]).all():
                image_id = int(self.image_ids[place[position]])
                category_id = self.categories[found["labels"][row]][0]
                area, crowd = found["areas"][row], bool(found["crowd"][row])
                number = len(annotations) + 1
                annotations.append(coco_annotation(number, image_id, category_id, corners[row], area, crowd))
        images = [
            {"id": int(image_id), "height": int(height), "width": int(width), "file_name": f"{image_id}"}
            for image_id, (height, width) in zip(self.image_ids, self.image_sizes, strict=True)
        ]
        categories = [{"id": number, "name": name} for number, name in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def open_prepared_boxes(
    data_config, split: str, training: bool
) -> tuple[PreparedBoxes, tuple[str, ...], tuple[int, ...]]:
    """Opens one split of a TFDS data set with boxes; its records are read once, for sizes and boxes, and these kept.

    Args:
      data_config: `config.data`; reads `name`, `data_dir`, `on_corrupt` and, in training, `masks` and `max_boxes`.
      split: a TFDS split, sub-splits included.
      training: see `open_annotated`.

    Returns:
      The records, the categories' names, and their ids: COCO's for its 80 classes, else from 1 on.

    Raises:
      ValueError: as `open_prepared`; no boxes in its features, or masks are asked for.
    """
    name = data_config.name
    builder = open_builder(name, data_config.data_dir)
    features = builder.info.features
    objects = getattr(features["objects"], "feature", {}) if "objects" in features else {}
    if not ("image" in features and "bbox" in objects and "label" in objects):
        raise ValueError(
            f"data.name: {name!r} has no boxes: expected the features 'image' and 'objects' with 'bbox' and 'label', "
            f"it has {sorted(features)}."
        )
    if training and data_config.masks:
        raise ValueError(f"data.masks = True: {name!r} has no masks, expected data.name = 'coco' and COCO's JSON.")
    examples = open_examples(builder, split)
    found = _read_objects(builder, split, examples, data_config.on_corrupt)
    sizes, images = found["sizes"], found["images"]
    names = tuple(objects["label"].names)
    ids = tuple(number for number in range(1, 91) if number not in _COCO_UNUSED)
    ids = ids if builder.name == "coco" and len(names) == _COCO_CLASSES else tuple(range(1, len(names) + 1))
    boxes = _pixels(found["boxes"], sizes[images])
    boxes[:, 2:] -= boxes[:, :2]
    annotations = Annotations(
        images=images,
        boxes=boxes,
        areas=found["areas"],
        labels=found["labels"],
        crowd=found["crowd"],
        ignored=np.zeros(len(images), bool),
        masks=(),
        place=lambda number: f"image {found['ids'][images[number]]}",
    )
    findings = Findings(f"data.name: {builder.info.full_name}, split {split!r}")
    usable = usable_objects(annotations, sizes, findings, with_masks=False)
    kept = np.arange(len(sizes))
    if training:
        places = [f"image {number}" for number in found["ids"].tolist()]
        kept = np.flatnonzero(trained_images(annotations, usable, sizes, places, data_config.max_boxes, findings))
        for position in np.flatnonzero((sizes == _UNREADABLE).all(axis=1)):
            findings.add("records that cannot be read; left out", examples.where(int(position)))
        findings.log()
    categories = tuple(zip(ids, names, strict=True))
    records = PreparedBoxes(
        features, examples, kept, found["ids"][kept], sizes[kept], usable.only(kept), found, categories
    )
    return records, names, ids


def _pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes of shares, ymin xmin ymax xmax, as x1 y1 x2 y2 in pixels: float64 [m, 4]."""
    height, width = sizes.T.astype(np.float64)
    ymin, xmin, ymax, xmax = boxes.T.astype(np.float64)
    return np.stack([xmin * width, ymin * height, xmax * width, ymax * height], axis=-1)


def _parsed(features: tfds.features.FeaturesDict, record: bytes) -> dict[str, Any]:
    return features.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})


def _read_objects(builder, split: str, examples: ArrayRecords | TFRecords, on_corrupt: str) -> dict[str, np.ndarray]:
    """Of n images `sizes` int32 [n, 2] and `ids` int64 [n]; of boxes `images`, `boxes`, `labels`, `areas`, `crowd`.

    A record that cannot be read is one of an image of 1 x 1 without boxes, unless `on_corrupt` is "error".
    """
    folder = cache_folder("boxes")
    key = "\0".join([str(builder.data_path), split, builder.info.as_json])
    cached = folder and folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    if cached and cached.exists():
        try:
            with np.load(cached) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s is damaged and will be made again: %s", cached, error)
    features = builder.info.features
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        rows = executor.map(lambda i: _row(features, examples, i, on_corrupt), range(len(examples)))
        rows = list(with_progress(rows, len(examples), f"reading sizes and boxes of {builder.info.full_name}"))
    counts = [len(row["labels"]) for row in rows]
    found = {key: np.concatenate([row[key] for row in rows]) for key in ("boxes", "labels", "areas", "crowd")}
    found |= {key: np.array([row[key] for row in rows]) for key in ("sizes", "ids")}
    found["images"] = np.repeat(np.arange(len(rows)), counts)
    if cached:
        content = io.BytesIO()
        np.savez(content, **found)
        try:
            write_atomically(cached, content.getvalue())
        except OSError as error:
            log.warning("sizes and boxes were not kept and will be read again: %s", error)
    return found


def _row(
    features: tfds.features.FeaturesDict, examples: ArrayRecords | TFRecords, position: int, on_corrupt: str
) -> dict[str, Any]:
    try:
        record = _parsed(features, examples[position])
        size = jpeg.size(record["image"]) or Image.open(io.BytesIO(record["image"])).size
    # Broad: whatever a damaged record makes the reader raise, the message must say which one it was.
    except Exception as error:
        if on_corrupt == "error":
            raise ValueError(f"data.data_dir: {examples.where(position)}: {error}") from error
        record, size = {"objects": {}}, _UNREADABLE
    objects = record["objects"]
    labels = np.asarray(objects.get("label", ()), np.int64)
    boxes = np.asarray(objects.get("bbox", ()), np.float32).reshape(-1, 4)
    sides = (boxes[:, 2:] - boxes[:, :2]) * np.array(size[::-1], np.float32)
    return {
        "sizes": np.array(size[::-1], np.int32),
        "ids": np.int64(record.get("image/id", position)),
        "boxes": boxes,
        "labels": labels,
        "areas": np.asarray(objects.get("area", sides.prod(axis=1)), np.float64),
        "crowd": np.asarray(objects.get("is_crowd", np.zeros(len(labels))), bool),
    }
