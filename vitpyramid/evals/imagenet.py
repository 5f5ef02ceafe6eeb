"""Data sets that are labelled with ImageNet's classes, or with some of them, or with groups of them.

| data set | folders | scored as |
|---|---|---|
| ImageNet-V2 | "0" ... "999": the classes' numbers | 1000 classes |
| ImageNet-Sketch | 1000 WordNet ids | 1000 classes |
| ImageNet-A, -R | 200 WordNet ids | the largest of those 200 logits |
| ReaL | ImageNet's validation images, `real.json` | right if one of the image's labels; those without do not count |
| Background Challenge | 9 groups, `in_to_in9.json` | right if of the image's group |

The WordNet ids' order is that of TensorFlow Datasets' list, which is the sorted one. Scoring A and R among their 200
classes is their authors' convention (github.com/hendrycks/natural-adv-examples, imagenet-r).
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SYNSET = re.compile(r"n\d{8}")
_REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
# TFDS sets that have all of ImageNet's classes in their features and images of some.
PARTIAL = ("imagenet_a", "imagenet_r")


@functools.cache
def synsets() -> tuple[str, ...]:
    """WordNet ids of ILSVRC 2012's classes, in its order."""
    file = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / "labels.txt"
    return tuple(file.read_text().split())


def model_classes(names: Sequence[str], num_classes: int) -> np.ndarray:
    """The model's class for each class of a data set, int32 `[K']`.

    Args:
      names: of the data set's classes, such as folders.

    Raises:
      ValueError: names that say nothing about the model's classes, and are not as many.
    """
    if num_classes == len(synsets()) and all(map(_SYNSET.fullmatch, names)):
        place = {synset: k for k, synset in enumerate(synsets())}
        if unknown := [name for name in names if name not in place]:
            raise ValueError(f"classes {', '.join(unknown[:5])}: expected WordNet ids of ImageNet's 1000 classes")
        return np.array([place[name] for name in names], np.int32)
    if all(name.isdecimal() and int(name) < num_classes for name in names):
        return np.array([int(name) for name in names], np.int32)
    if len(names) != num_classes:
        raise ValueError(
            f"{len(names)} classes, {', '.join(names[:3])} ...: expected the {num_classes} of the model, numbers of "
            "them, or WordNet ids"
        )
    return np.arange(num_classes, dtype=np.int32)


def read_groups(file: Path, num_classes: int) -> np.ndarray:
    """The group of each class, int32 `[num_classes]`, -1 for none, from JSON `{"CLASS": GROUP, ...}`.

    Raises:
      ValueError: no such JSON, or not one group for each class.
      OSError: it cannot be read.
    """
    try:
        groups = {int(key): int(value) for key, value in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{file}: expected JSON such as {{"0": -1, "1": 4, ...}}, a group for each class') from error
    if sorted(groups) != list(range(num_classes)):
        raise ValueError(f"{file}: expected a group for each class 0 to {num_classes - 1}, it has {len(groups)} keys")
    return np.array([groups[k] for k in range(num_classes)], np.int32)


def read_real(file: Path) -> list[list[int]]:
    """ReaL's labels of each validation image, in the order of their numbers.

    Raises:
      ValueError: no JSON list of lists of classes.
      OSError: it cannot be read.
    """
    try:
        labels = json.loads(file.read_text())
        return [[int(label) for label in one] for one in labels]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON list with a list of classes for each image") from error


def real_number(name: str) -> int:
    """The place of a validation image among ReaL's labels, from the name of its file. Raises `ValueError`."""
    found = _REAL_NAME.search(name)
    if not found:
        raise ValueError(f"{name}: expected a file called ILSVRC2012_val_XXXXXXXX.JPEG")
    return int(found[1]) - 1
