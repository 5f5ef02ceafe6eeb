"""Random access to the annotated images of a split, wherever they lie."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from vitpyramid.data.annotations import Example
from vitpyramid.data.boxes import open_prepared_boxes
from vitpyramid.data.coco import open_coco
from vitpyramid.data.label_maps import open_label_maps
from vitpyramid.data.scenes import open_scenes
from vitpyramid.files import as_path, reach

_LABEL_MAPS = ("ade20k", "label_maps")


class AnnotatedRecords(Protocol):
    """What a kind of annotated source provides; picklable, so that data workers can open it again."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Any exception if it cannot be read."""

    def where(self, index: int) -> str:
        """The file, for messages."""

    def sizes(self) -> np.ndarray:
        """Height and width of every image, int32 [n, 2]; of some kinds, read from the files."""

    def ids(self) -> list:
        """What names each image in results."""

    def ground_truth(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` as in COCO's JSON; of kinds with boxes."""


@dataclasses.dataclass(frozen=True)
class Annotated:
    """A random-access split of annotated images; picklable. `source[i]` is an `Example`, or any exception.

    Attributes:
      name, split: as in the config.
      task: "detect": boxes, and masks where asked for; "segment": label maps.
      categories: names of the classes, in the order of labels.
      category_ids: their ids in COCO's JSON and in results.
      records: where the examples lie.
    """

    name: str
    split: str
    task: str
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: AnnotatedRecords

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self.records[index]

    def where(self, index: int) -> str:
        """The file where an example lies, for messages."""
        return self.records.where(index)

    def sizes(self) -> np.ndarray:
        """Height and width of every image, int32 [n, 2]."""
        return self.records.sizes()

    @property
    def ids(self) -> list:
        """What names each image in results: COCO's image ids, or paths."""
        return self.records.ids()

    def ground_truth(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` as in COCO's JSON, of the images of this split; of "detect".

        Areas and crowds are those of the JSON, and nothing is left out of it that cannot teach.
        """
        return self.records.ground_truth()


def open_annotated(data_config, split: str, task: str, training: bool = False) -> Annotated:
    """Opens one split of a data set with boxes, masks or label maps, unshuffled.

    Args:
      data_config: `config.data`; reads `name`, which is one of
        "coco": images and COCO's JSON, see `vitpyramid.data.coco`;
        "ade20k", "label_maps": folders of images and of label maps, see `vitpyramid.data.label_maps`;
        "scenes": composed of scikit-learn's digits, see `vitpyramid.data.scenes`;
        any other: the name of a TFDS builder with boxes, such as "coco/2017".
        Reads `data_dir`, `on_corrupt`, and in training, where there are boxes, `masks` and `max_boxes`.
      split: a split, sub-splits included: "train", "train[:99%]", "validation".
      task: "detect" or "segment".
      training: images that mmdetection does not train on are left out; a line is logged for each kind of annotation
        that cannot be right.

    Raises:
      ValueError: no such data set, not for this task, no such split, an empty split, damaged or missing files.
    """
    name = data_config.name
    try:
        reach(as_path(data_config.data_dir))
    except (ValueError, OSError) as error:
        raise ValueError(f"data.data_dir: {error}") from error
    if (name in _LABEL_MAPS) != (task == "segment") and name != "scenes":
        kinds = {
            "detect": "boxes: 'coco', 'scenes' or a TFDS builder",
            "segment": "label maps: 'ade20k', 'label_maps' or 'scenes'",
        }
        raise ValueError(f"data.name = {name!r}: expected for task {task!r} a data set with {kinds[task]}.")
    if name == "scenes":
        opened = open_scenes(data_config, split, task, training)
    elif name == "coco":
        opened = open_coco(data_config, split, training)
    elif name in _LABEL_MAPS:
        opened = open_label_maps(data_config, split)
    else:
        opened = open_prepared_boxes(data_config, split, training)
    records, categories, category_ids = opened
    if len(records) == 0:
        raise ValueError(f"data.train_split / data.eval_split: the split {split!r} of {name!r} is empty.")
    return Annotated(name, split, task, categories, category_ids, records)
