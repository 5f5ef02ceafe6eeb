"""COCO from its published files, and data of one's own in that layout.

`data_dir/annotations/instances_SPLIT.json` beside `data_dir/SPLIT/` with the images: `train2017` and `val2017` as
cocodataset.org has them. Labels are places of categories in the order of their ids, which may have gaps.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitpyramid.data.annotations import Example, Findings
from vitpyramid.data.objects import Annotations, Objects, trained_images, usable_objects
from vitpyramid.data.splits import split_names, split_ranges, unknown_split
from vitpyramid.files import as_path, read_bytes

_PREFIX = "instances_"


@dataclasses.dataclass(frozen=True)
class CocoRecords:
    """Images of a folder, and their objects out of a JSON file.

    Attributes:
      json_path: the JSON file, which is read again for `ground_truth`.
      folder: of the images.
      names: of the image files in it.
      image_ids: of the JSON.
      image_sizes: int32 [n, 2], height and width.
      objects: of the images.
      category_ids: of the JSON, sorted.
    """

    json_path: str
    folder: str
    names: Sequence[str]
    image_ids: Sequence[int | str]
    image_sizes: np.ndarray
    objects: Objects
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        height, width = self.image_sizes[index].tolist()
        return Example(read_bytes(self.where(index)), (height, width), **self.objects.of(index))

    def where(self, index: int) -> str:
        """The image file, for messages."""
        return os.path.join(self.folder, self.names[index])

    def sizes(self) -> np.ndarray:
        """Height and width of every image as the JSON has them, int32 [n, 2]."""
        return self.image_sizes

    def ids(self) -> list:
        """Image ids of the JSON."""
        return list(self.image_ids)

    def ground_truth(self) -> dict[str, Any]:
        """The JSON, of these images and its own categories.

        Annotations are numbered anew from 1, as pycocotools takes an object with the id 0 for none. Those without
        `area` get that of the box; those without four finite numbers for a box are left out.
        """
        content = _read_json(self.json_path)
        images, categories = set(self.image_ids), set(self.category_ids)
        kept = [
            entry
            for entry in content["annotations"]
            if entry["image_id"] in images and entry["category_id"] in categories and np.isfinite(_box(entry)).all()
        ]
        return {
            "images": [entry for entry in content["images"] if entry["id"] in images],
            "annotations": [
                {**entry, "id": number, "area": _area(entry), "iscrowd": int(entry.get("iscrowd", 0))}
                for number, entry in enumerate(kept, start=1)
            ],
            "categories": content["categories"],
        }


def open_coco(data_config, split: str, training: bool) -> tuple[CocoRecords, tuple[str, ...], tuple[int, ...]]:
    """Reads a split's JSON file and looks for its images.

    Args:
      data_config: `config.data`; reads `data_dir`, also gs://..., `on_corrupt`, and in training `masks` and
        `max_boxes`.
      split: "train2017", "val2017[:100]": a name, or a part of it in TFDS's syntax.
      training: see `open_annotated`.

    Returns:
      The records, the categories' names, and their ids.

    Raises:
      ValueError: no such split, a JSON file that is not COCO's, or, with `on_corrupt` "error", image files that are not
        there.
    """
    root = as_path(os.path.expanduser(data_config.data_dir))
    names = set(split_names(split))
    available = _splits_in(root)
    if len(names) > 1 or not names <= set(available):
        raise unknown_split("coco", split, available, f"expected one split, with its {_PREFIX}SPLIT.json in {root}")
    (name,) = names
    json_path, folder = os.fspath(root / "annotations" / f"{_PREFIX}{name}.json"), os.fspath(root / name)
    content = _read_json(json_path)
    try:
        images, categories = _images(content["images"]), _categories(content["categories"])
        listed = {image[0] for image in images}
        unlisted = [entry for entry in content["annotations"] if entry["image_id"] not in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data.data_dir: {json_path}: {error!r}, expected COCO's format.") from error
    positions = [i for _, part in split_ranges("coco", split, {name: len(images)}) for i in part]
    images = [images[i] for i in positions]
    findings = Findings(f"data.data_dir: {json_path}")
    for entry in unlisted:
        findings.add("annotations of images that are not listed; left out", f"image {entry['image_id']}")
    sizes = np.array([image[2:] for image in images], np.int32).reshape(-1, 2)
    found = _annotations(content["annotations"], [image[0] for image in images], list(categories), findings)
    del content
    try:
        objects = usable_objects(found, sizes, findings, training and data_config.masks)
    except ValueError as error:
        raise ValueError(f"data.data_dir: {json_path}: {error}") from error
    kept = np.arange(len(images))
    if training:
        places = [image[1] for image in images]
        kept = np.flatnonzero(trained_images(found, objects, sizes, places, data_config.max_boxes, findings))
    _look_for(folder, [images[i][1] for i in kept], data_config.on_corrupt, findings)
    if training:
        findings.log()
    records = CocoRecords(
        json_path,
        folder,
        tuple(images[i][1] for i in kept),
        tuple(images[i][0] for i in kept),
        sizes[kept],
        objects.only(kept),
        tuple(categories),
    )
    return records, tuple(categories.values()), tuple(categories)


def _splits_in(root) -> list[str]:
    try:
        names = [path.name for path in (root / "annotations").iterdir()]
    except OSError as error:
        raise ValueError(f"data.data_dir: cannot list {root / 'annotations'}: {error.strerror or error}.") from error
    return sorted(
        name.removeprefix(_PREFIX).removesuffix(".json")
        for name in names
        if name.startswith(_PREFIX) and name.endswith(".json")
    )


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.data_dir: {path}: cannot be read ({error}).") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"data.data_dir: {path}: expected lists named {', '.join(keys)}, as in COCO's JSON.")
    return content


def _images(entries: list) -> list[tuple]:
    """Id, file name, height and width of each image."""
    images = [(entry["id"], entry["file_name"], entry["height"], entry["width"]) for entry in entries]
    if len({image[0] for image in images}) < len(images):
        raise ValueError("two images have one id")
    return images


def _categories(entries: list) -> dict[int, str]:
    """Names by id, sorted by id."""
    categories = {entry["id"]: entry["name"] for entry in entries}
    if len(categories) < len(entries):
        raise ValueError("two categories have one id")
    return dict(sorted(categories.items()))


def _annotations(entries: list, image_ids: list, category_ids: list, findings: Findings) -> Annotations:
    """Those of the images in question."""
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    entries = [entry for entry in entries if entry["image_id"] in index_of]

    def place(number: int) -> str:
        return f"annotation {entries[number].get('id')} of image {entries[number]['image_id']}"

    for number, entry in enumerate(entries):
        if "area" not in entry:
            findings.add("annotations without area; that of the box is taken", place(number))
    return Annotations(
        images=np.array([index_of[entry["image_id"]] for entry in entries], np.int64),
        boxes=np.array([_box(entry) for entry in entries], np.float64).reshape(-1, 4),
        areas=np.array([_area(entry) for entry in entries], np.float64),
        labels=np.array([label_of.get(entry.get("category_id"), -1) for entry in entries], np.int64),
        crowd=np.array([bool(entry.get("iscrowd")) for entry in entries], bool),
        ignored=np.array([bool(entry.get("ignore")) for entry in entries], bool),
        masks=[entry.get("segmentation") for entry in entries],
        place=place,
    )


def _box(entry: dict) -> list[float]:
    try:
        x, y, w, h = (float(number) for number in entry["bbox"])
    except (KeyError, TypeError, ValueError):
        return [np.nan] * 4
    return [x, y, w, h]


def _area(entry: dict) -> float:
    if "area" in entry:
        return float(entry["area"])
    return float(np.prod(_box(entry)[2:]))


def _look_for(folder: str, names: list[str], on_corrupt: str, findings: Findings) -> None:
    """Lists the folders of the images once, which takes less than asking for each file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        below, base = os.path.split(name)
        if below not in listed:
            path = as_path(os.path.join(folder, below))
            listed[below] = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if base not in listed[below]:
            missing.append(name)
    if missing and (on_corrupt == "error" or len(missing) == len(names)):
        raise ValueError(
            f"data.data_dir: {folder}: {len(missing)} of {len(names)} images are not there, such as {missing[0]!r}."
        )
    for name in missing:
        findings.add("image files that are not there; skipped", name)
