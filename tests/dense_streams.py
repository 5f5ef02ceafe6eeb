"""Annotated images in memory and configs for the tests of dense prediction's data."""

import json
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from streams import encoded
from vitpyramid.data.annotations import Example

SIZES = ((20, 30), (30, 20), (24, 30), (33, 18), (20, 31))  # of the images in turn: landscape, portrait, ...


def dense_config(**keys):
    """Two canvases, landscape and portrait, of images a few pixels larger than they are."""
    data = {"name": "memory", "data_dir": "", "train_split": "train", "eval_split": "test"}
    data |= {"resize": "mmdet", "short_side": (24, 32), "short_side_range": True, "long_side": 48}
    data |= {"scale_range": (1.0, 1.0), "canvas": ((32, 48), (48, 32)), "max_boxes": 3, "masks": True, "crop": False}
    data |= {"eval_short_side": 28, "eval_align": 1, "eval_canvas": ((32, 48), (48, 32)), "cat_max_ratio": 0.75}
    data |= {"crop_short_side": (), "crop_side": (12, 30)}
    data |= {"photometric": False, "interpolation": "bilinear", "flip": 0.5}
    data |= {"threads": 2, "workers": 0, "on_corrupt": "error"}
    config = ConfigDict({"seed": 3, "batch_size": 4, "eval": {"batch_size": 4}, "data": data}, type_safe=False)
    config.update_from_flattened_dict(keys)
    return config


class Scenes(SimpleNamespace):
    """A source of images with one bright rectangle each, of which the box, mask or label map is known."""

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def where(self, index):
        return f"record {index}"

    def sizes(self):
        return np.array([example.size for example in self.examples], np.int32)


def rectangle(index):
    """Height and width of an image, and the box x1 y1 x2 y2 of the rectangle in it."""
    rng = np.random.default_rng(index)
    height, width = SIZES[index % len(SIZES)]
    left, top = rng.integers(2, 8, 2).tolist()
    return (height, width), [left, top, left + int(rng.integers(5, 9)), top + int(rng.integers(5, 9))]


def rectangles(count, task="detect"):
    examples = []
    for index in range(count):
        size, (left, top, right, bottom) = rectangle(index)
        inside = np.zeros(size, np.uint8)
        inside[top:bottom, left:right] = 1
        image = np.full((*size, 3), 10 + index, np.uint8) + 200 * inside[..., None]
        polygon = [left, top, right, top, right, bottom, left, bottom]
        box = np.array([[left, top, right, bottom]], np.float64)
        known = {"boxes": box, "labels": np.array([index]), "crowd": np.array([False]), "masks": ([polygon],)}
        if task == "segment":
            known = {"label_map": encoded(Image.fromarray(inside))}
        examples.append(Example(encoded(Image.fromarray(image)), size, **known))
    return Scenes(name="memory", split="train", task=task, categories=tuple("ab"), examples=examples)


def write_coco(folder, annotations, sizes=((40, 60), (60, 40)), categories=((7, "cat"), (2, "dog")), **image_keys):
    """`instances_val.json` and its images; `annotations` are entries without what is the same for all."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    images = []
    for number, (height, width) in enumerate(sizes, start=10):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / "val" / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        images.append(entry | image_keys)
    base = {"image_id": 10, "category_id": 7, "iscrowd": 0, "area": 50.0, "bbox": [5.0, 6.0, 10.0, 8.0]}
    entries = [base | {"id": number} | entry for number, entry in enumerate(annotations, start=1)]
    entries = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    listed = [{"id": number, "name": name} for number, name in categories]
    content = {"images": images, "annotations": entries, "categories": listed}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return content
