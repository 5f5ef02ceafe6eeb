"""What the classes of a network are called."""

import functools
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitpyramid.files import as_path, in_bucket
from vitpyramid.heads.registry import DENSE, create_model, list_models
from vitpyramid.weights import store

# The first words of the synsets of ILSVRC 2012 in its order, as torchvision lists them (BSD-3-Clause), which tells both
# cranes and both maillots apart. Synsets: WordNet 3.0, Copyright 2006 by Princeton University, all rights reserved;
# https://wordnet.princeton.edu/license-and-commercial-use.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")
# Ids and names of COCO's categories, in the order of labels.
COCO_CLASSES = Path(__file__).with_name("coco_classes.txt")
_IMAGENET = 1000
_SYNSET = re.compile(r"n\d{8}")  # ImageNet's names of folders, and TFDS's of its classes


def class_names(source: str | os.PathLike) -> list[str]:
    """Names of the classes of a model, of a run or of converted weights, by label.

    Args:
      source: one of `list_models()`; a work directory or folder of converted weights, also gs://....

    Returns:
      Those of the data that the weights were trained on; where nothing says which these were, ImageNet's for 1000
      classes, COCO's for 80 of a network for dense prediction, else "class 0", "class 1" ....

    Raises:
      ValueError: it is neither.
    """
    if source in list_models():
        return default_names(create_model(source).num_classes, source)
    meta = read_meta(source)
    return saved_names(meta) or default_names(meta["network"]["num_classes"], meta["network"]["name"])


def names_of(source: str, count: int, network: str) -> list[str]:
    """Names of the `count` classes of a network called `network` whose weights came from `source`, wherever that is."""
    names = saved_names(saved_meta(source))
    return names if len(names) == count else default_names(count, network)


def categories_of(names: Sequence[str], meta: Mapping = types.MappingProxyType({})) -> dict[int, str]:
    """Names of classes by what their ids are in results.

    Those in `meta`, which stands beside the weights, where it has as many; else COCO's if these are its classes, else
    1, 2 ....
    """
    saved = meta.get("about", {}).get("category_ids", [])
    if len(saved) == len(names):
        return dict(zip(saved, names, strict=True))
    coco = _coco()
    if list(names) == list(coco.values()):
        return coco
    return dict(enumerate(names, start=0 if list(names) == _by_id() else 1))


def saved_meta(source: str) -> dict:
    """What stands beside the arrays that weights from `source` come from; nothing unless that is a folder of such."""
    local = in_bucket(source) or "://" not in source
    folder = as_path(source) if in_bucket(source) else Path(source).expanduser()
    return store.newest_meta(folder) if local and store.has_weights(folder) else {}


def saved_names(meta: dict) -> list[str]:
    """Names of classes in what stands beside a checkpoint's arrays; none if there are none."""
    names = meta.get("about", {}).get("classes", [])
    if len(names) == _IMAGENET and all(map(_SYNSET.fullmatch, names)) and names == sorted(names):
        return default_names(_IMAGENET)
    return names


def default_names(count: int, network: str = "") -> list[str]:
    """ImageNet's names for 1000 classes; of a network for dense prediction COCO's for 80, and for 91, which are its ids
    (facebookresearch's DETR); numbers for others."""
    if count == _IMAGENET:
        return names_in(IMAGENET_CLASSES, count)
    if network in DENSE:
        for coco in (list(_coco().values()), _by_id()):
            if count == len(coco):
                return coco
    return [f"class {i}" for i in range(count)]


@functools.cache
def _coco() -> dict[int, str]:
    lines = (line.split(" ", 1) for line in COCO_CLASSES.read_text("utf-8").splitlines())
    return {int(number): name for number, name in lines}


def _by_id() -> list[str]:
    """COCO's names at the places of their ids."""
    return [_coco().get(i, f"class {i}") for i in range(max(_coco()) + 1)]


def names_in(file: Path, count: int) -> list[str]:
    """Names of `count` classes, from the lines of a file.

    Raises:
      ValueError: the file has another number of lines, or is no text.
      OSError: it cannot be read.
    """
    try:
        names = file.read_text("utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, one name a line") from error
    if len(names) != count:
        raise ValueError(f"{file}: expected {count} lines, one for each class of the model, it has {len(names)}")
    return [name.strip() for name in names]


def read_meta(source: str | os.PathLike) -> dict:
    """What stands beside the newest checkpoint of a folder. Raises `ValueError` if `source` is none."""
    folder = as_path(source) if in_bucket(source) else Path(source).expanduser()
    if not store.has_weights(folder):
        try:
            create_model(os.fspath(source))
        except ValueError as error:
            raise ValueError(f"{error}, or a folder with a complete checkpoint in {store.FOLDER}/") from None
    return store.newest_meta(folder)
