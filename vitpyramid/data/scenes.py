"""Scenes composed of scikit-learn's handwritten digits, with boxes, masks and label maps: nothing to download.

A scene is a dark, textured ground, 64 to 80 pixels high and wide, with up to three digits of 26 to 42 pixels in a light
colour each. Later digits lie on top of earlier ones, of which they hide at most 20 %. Scenes of the training split are
made of the digits of `Digits`' training split, those of the test split of the others.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vitpyramid.data.annotations import Example, coco_annotation
from vitpyramid.data.digits import split_digits
from vitpyramid.data.splits import split_ranges

SIZES = {"train": 4000, "test": 400}  # scenes
CATEGORIES = tuple("0123456789")
_MOST = 3  # digits
_SIDES = (26, 42)
_LENGTHS = (64, 80)
_HIDDEN = 0.2  # share of a digit's pixels
_TRIES = 10
_CONTRAST = 100  # levels of luma from the ground's mean to a digit, at least
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclasses.dataclass(frozen=True)
class SceneRecords:
    """Scene `numbers[i]` of a split is a function of the split and that number.

    Attributes:
      numbers: of the scenes.
      training: whether digits are those of the training split.
      label_maps: whether examples hold label maps rather than boxes.
      digits: uint8 [n, 8, 8], ink.
      classes: int64 [n].
    """

    numbers: Sequence[int]
    training: bool
    label_maps: bool
    digits: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        pixels, layers, labels = self._compose(index)
        size = pixels.shape[:2]
        if self.label_maps:
            label_map = np.zeros(size, np.uint8)
            for layer, label in zip(layers, labels, strict=True):
                label_map[layer] = label + 1
            return Example(_file(pixels), size=size, label_map=_file(label_map))
        boxes = np.array([_bounds(layer) for layer in layers], np.float64).reshape(-1, 4)
        masks = tuple(coco_mask.encode(np.asfortranarray(layer, np.uint8)) for layer in layers)
        return Example(_file(pixels), size, boxes, labels, np.zeros(len(labels), bool), masks)

    def where(self, index: int) -> str:
        """The scene, for messages."""
        return f"scene {self.numbers[index]}"

    def sizes(self) -> np.ndarray:
        """Height and width of every scene, int32 [n, 2]."""
        return np.array([self._size(self._generator(i)) for i in range(len(self))], np.int32)

    def ids(self) -> list[int]:
        """Numbers of the scenes in the split."""
        return [int(number) for number in self.numbers]

    def ground_truth(self) -> dict[str, Any]:
        """As in COCO's JSON; the area is the visible part of the digit."""
        annotations = []
        for index, (image_id, size) in enumerate(zip(self.ids(), self.sizes(), strict=True)):
            example = self[index]
            for box, label, mask in zip(example.boxes, example.labels, example.masks, strict=True):
                area = float(coco_mask.area(mask))
                entry = coco_annotation(len(annotations) + 1, image_id, int(label) + 1, box, area, False)
                text = mask["counts"].decode("ascii")
                annotations.append(entry | {"segmentation": {"size": size.tolist(), "counts": text}})
        images = [
            {"id": image_id, "height": int(height), "width": int(width), "file_name": f"{image_id}.ppm"}
            for image_id, (height, width) in zip(self.ids(), self.sizes(), strict=True)
        ]
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(CATEGORIES)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((int(self.training), int(self.numbers[index])))

    @staticmethod
    def _size(rng: np.random.Generator) -> tuple[int, int]:
        height, width = rng.integers(_LENGTHS[0], _LENGTHS[1], 2, endpoint=True).tolist()
        return height, width

    def _compose(self, index: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Pixels uint8 [h, w, 3], the visible pixels of each digit, bool [h, w], and the digits' classes."""
        rng = self._generator(index)
        height, width = self._size(rng)
        ground = rng.uniform(10, 90, 3)
        pixels = _texture(height, width, rng) + ground
        layers, labels = [], []
        for _ in range(rng.integers(1, _MOST, endpoint=True)):
            digit, colour = rng.integers(len(self.digits)), _colour(ground, rng)
            side = int(rng.integers(*_SIDES, endpoint=True))
            ink = np.asarray(Image.fromarray(self.digits[digit]).resize((side, side), Image.Resampling.BICUBIC))
            for _ in range(_TRIES):
                top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
                cover = np.zeros((height, width), bool)
                cover[top : top + side, left : left + side] = ink >= 128
                # Compared with what a digit had at first: several others could hide it one by one.
                if all((layer & ~cover).sum() >= (1 - _HIDDEN) * first for layer, first in layers):
                    break
            else:
                continue
            part = (slice(top, top + side), slice(left, left + side))
            share = ink[..., None] / 255
            pixels[part] = pixels[part] * (1 - share) + colour * share
            layers = [(layer & ~cover, first) for layer, first in layers] + [(cover, cover.sum())]
            labels.append(self.classes[digit])
        return np.clip(pixels, 0, 255).astype(np.uint8), [layer for layer, _ in layers], np.array(labels, np.int64)


def open_scenes(
    data_config, split: str, task: str, training: bool
) -> tuple[SceneRecords, tuple[str, ...], tuple[int, ...]]:
    """Opens scenes; the same ones on every call.

    Args:
      data_config: `config.data`; in training for "detect" reads `max_boxes`.
      split: "train", "test", and parts of them in TFDS's syntax.
      task: "detect" gives boxes and masks, "segment" label maps, with a class for the ground before the digits'.

    Returns:
      The records, names of the classes, and their ids.

    Raises:
      ValueError: no such split, scenes of both splits at once, or more digits than `max_boxes`.
    """
    if training and task == "detect" and data_config.max_boxes < _MOST:
        raise ValueError(f"data.max_boxes: {data_config.max_boxes}: expected {_MOST} or more, as scenes have.")
    ranges = split_ranges("scenes", split, SIZES)
    names = {name for name, _ in ranges}
    if len(names) > 1:
        raise ValueError(
            f"data.train_split / data.eval_split: {split!r}: expected scenes of one split, 'train' or 'test'."
        )
    training = names == {"train"}
    images, classes = split_digits("train" if training else "test")
    numbers = np.concatenate([np.asarray(positions, np.int64) for _, positions in ranges])
    records = SceneRecords(numbers, training, task == "segment", images, classes)
    if task == "segment":
        return records, ("ground", *CATEGORIES), tuple(range(len(CATEGORIES) + 1))
    return records, CATEGORIES, tuple(range(1, len(CATEGORIES) + 1))


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of three scales with standard deviations of 3 to 9 levels, float64 [height, width, 3]."""
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 24):
        for band in range(3):
            coarse = Image.fromarray(rng.normal(0, rng.uniform(3, 9), (cells, cells)).astype(np.float32))
            total[..., band] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return total


def _colour(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        colour = rng.uniform(0, 255, 3)
        if (colour - ground) @ _LUMA >= _CONTRAST:
            return colour


def _bounds(layer: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(layer.any(axis=1)), np.flatnonzero(layer.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _file(pixels: np.ndarray) -> bytes:
    """As PPM or PGM, for lack of anything to compress in noise."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "ppm")
    return file.getvalue()
