"""Detectors and segmenters on photographs: what they find, in COCO's form or as label maps, and pictures of it."""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as run_lengths

from vitpyramid.data import dense_pipeline
from vitpyramid.data.annotated import Annotated
from vitpyramid.data.annotations import Example
from vitpyramid.evals import coco
from vitpyramid.files import write_atomically
from vitpyramid.tasks import TASKS, Task, segment
from vitpyramid.tools import draw
from vitpyramid.tools.classes import saved_meta
from vitpyramid.tools.preprocess import open_image
from vitpyramid.train.config import load_config, reference

PICTURE, LABELS, NUMBERS = ".predicted.png", ".labels.png", ".predicted.json"  # what names of files end with
_LEAST = 384  # pixels of the shorter side of a picture; smaller images are enlarged
_STEP = 256  # sides of label maps are computed in multiples of this, so that few programs are compiled
_MULTIPLE = 32  # of which sides of canvases are


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found in an image; coordinates are pixels of the image as it is looked at, upright.

    Attributes:
      path: of its file.
      image: RGB, upright.
      results: of a detector, the best first, as COCO's results: `image_id` (the path), `category_id`, `score`, `bbox`
        (x, y, width, height) and, of those who predict masks, `segmentation`; and the class's `name`.
      label_map: of a segmenter, uint8 `[height, width]`.
      error: why the file could not be read, else empty.
    """

    path: Path
    image: Image.Image | None = None
    results: tuple[dict, ...] = ()
    label_map: np.ndarray | None = None
    error: str = ""


def open_task(checkpoint: str, network: Mapping, size: tuple[int, int] | None = None) -> Task:
    """The task of a network, whose evaluation is that of the run whose work directory `checkpoint` is.

    Of other weights images are resized as in the recipe of the network's name, `configs/detect.py:NAME`, or as
    `configs/base.py` says where there is none.

    Args:
      checkpoint: where weights came from, as `load_pretrained` takes it.
      network: what `create_model` makes the network of.
      size: what the shorter and the longer side of images may at most become; None: as above.
    """
    kinds = (kind for kind, task in TASKS.items() if task.RULES["model.name"].holds(network["name"]))
    kind = next(kinds, "detect")
    config = reference()
    with config.unlocked(), config.ignore_type():
        config.update(saved_meta(checkpoint).get("config") or _recipe(kind, network["name"]))
    config.task, config.model.name, config.model.backbone = kind, network["name"], network["backbone"]
    config.model.num_classes, config.data.image_size = network["num_classes"], network["image_size"]
    config.model.dtype, config.model.remat, config.model.scan = "float32", False, False
    config.data.workers, config.data.on_corrupt = 0, "error"
    if size:
        short, long = sorted(size)
        config.data.eval_short_side, config.data.long_side = short, long
        short, long = (-(-side // _MULTIPLE) * _MULTIPLE for side in (short, long))
        config.data.eval_canvas = tuple({(short, long): 0, (long, short): 0})
    return TASKS[kind].make_task(config)


def _recipe(kind: str, name: str) -> ConfigDict | dict:
    for file in (kind, "detr"):
        with contextlib.suppress(ValueError):  # it has none for this network
            return load_config(f"{file}.py:{name}")
    return {}


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """Images in memory, as a source has them."""

    images: Sequence[Image.Image]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        self.images[index].save(file := io.BytesIO(), "ppm")
        return Example(file.getvalue())

    def where(self, index: int) -> str:
        return f"image {index}"

    def sizes(self) -> np.ndarray:
        return np.array([(image.height, image.width) for image in self.images], np.int32)


def rows_of(config: ConfigDict, images: Sequence[Image.Image], names: Sequence[str], batch: int = 1) -> Iterator[dict]:
    """Batches of images, upright, as `dense_pipeline.make_eval` makes them; `names` of the classes."""
    config, ids = config.copy_and_resolve_references(), tuple(range(len(names)))
    config.eval.batch_size = batch
    return dense_pipeline.make_eval(config, Annotated("images", "", config.task, tuple(names), ids, _Pictures(images)))


def look(
    task: Task,
    variables: dict,
    paths: Sequence[Path],
    categories: Mapping[int, str],
    threshold: float = 0.5,
    batch: int = 1,
) -> Iterator[Seen]:
    """What a network finds in the images in `paths`, in their order.

    Args:
      task: of `open_task`.
      variables: as `load_pretrained` gives them.
      categories: names of the classes by id, in the order of labels.
      threshold: of scores; detections of less are left out.
      batch: images that are looked at together. A program is compiled for each shape of canvas.
    """
    kind = task.config.task
    variables = jax.device_put(variables)

    @jax.jit
    def outputs_of(variables: dict, rows: dict) -> Any:
        return task.model.apply(variables, task.prepare_eval(rows), train=False, method=task.call)

    def seen_in(images: dict[Path, Image.Image]) -> dict[Path, Seen]:
        seen = {}
        for rows in rows_of(task.config, tuple(images.values()), tuple(categories.values()), batch):
            places = [list(images)[index] if index >= 0 else None for index in rows["index"]]
            outputs = outputs_of(variables, rows)
            if kind == "segment":
                found = _label_maps(outputs, rows, places)
            else:
                found = _results(task, outputs, rows, places, categories, threshold)
            seen |= {path: Seen(path, images[path], **of_image) for path, of_image in found.items()}
        return seen

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), batch):
            chunk = paths[start : start + batch]
            opened = dict(zip(chunk, pool.map(open_image, chunk), strict=True))
            images = {path: image for path, image in opened.items() if not isinstance(image, str)}
            seen = {path: Seen(path, error=error) for path, error in opened.items() if path not in images}
            seen |= seen_in(images) if images else {}
            yield from (seen[path] for path in chunk)


def _results(task: Task, outputs, rows: dict, places: list, categories: Mapping[int, str], threshold: float) -> dict:
    """By path, `results` of `Seen`."""
    found = jax.device_get(task.measure(outputs, rows)["found"].found["detections"])
    found = found.replace(valid=found.valid & (found.scores >= threshold))
    image_ids = [place and str(place) for place in places]
    results = coco.results_of(found, rows["original_size"], image_ids, tuple(categories))
    return {
        place: {
            "results": tuple(
                {**result, "name": categories[result["category_id"]]}
                for result in results
                if result["image_id"] == str(place)
            )
        }
        for place in places
        if place
    }


def _label_maps(outputs: jax.Array, rows: dict, places: list) -> dict:
    """By path, `label_map` of `Seen`."""
    largest = tuple((-(-rows["original_size"].max(axis=0) // _STEP) * _STEP).tolist())
    canvas = rows["image"].shape[1:3]
    maps = np.asarray(_class_maps(outputs, rows["size"], rows["original_size"], canvas, largest))
    return {
        place: {"label_map": label_map[:height, :width]}
        for place, label_map, (height, width) in zip(places, maps, rows["original_size"], strict=True)
        if place
    }


_class_maps = jax.jit(segment.class_maps, static_argnums=(3, 4))


def picture(seen: Seen, names: Sequence[str]) -> Image.Image:
    """The image, enlarged if it is small, with boxes, names, scores and masks on it, or with its classes' colours."""
    image, factor = draw.scaled(seen.image, _LEAST)
    if seen.label_map is not None:
        labels = [label for label, _ in _shares(seen.label_map)]
        painted = draw.label_map_on(image, seen.label_map)
        return draw.with_legend(painted, labels, [names[label] for label in labels])
    worst_first = seen.results[::-1]
    corners = np.array([result["bbox"] for result in worst_first], float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    labels = [names.index(result["name"]) for result in worst_first]
    captions = [f"{result['name']} {result['score']:.2f}" for result in worst_first]
    masks = [run_lengths.decode(r["segmentation"]).astype(bool) for r in worst_first if "segmentation" in r]
    return draw.objects(image, corners, labels, captions, masks, factor)


def _shares(label_map: np.ndarray) -> list[tuple[int, float]]:
    """Classes of a label map and what share of it each has, the largest first."""
    labels, counts = np.unique(label_map, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(labels[i]), float(counts[i] / label_map.size)) for i in order]


def as_dict(seen: Seen, names: Sequence[str]) -> dict:
    """What was found, for JSON: `path` and `results`, or `classes` with their shares of the pixels."""
    if seen.label_map is None:
        return {"path": str(seen.path), "results": list(seen.results)}
    classes = [{"class": k, "name": names[k], "share": share} for k, share in _shares(seen.label_map)]
    return {"path": str(seen.path), "classes": classes}


def describe(seen: Seen, names: Sequence[str]) -> str:
    """What was found as lines of text."""
    if seen.label_map is None:
        boxes = (", ".join(f"{number:.0f}" for number in result["bbox"]) for result in seen.results)
        found = [f"{r['score']:8.2%}  {r['name']}  at {box}" for r, box in zip(seen.results, boxes, strict=True)]
    else:
        found = [f"{share:8.2%}  {names[label]}" for label, share in _shares(seen.label_map)]
    return "\n".join([str(seen.path), *found])


def make_room(paths: Sequence[Path], folder: Path | None) -> None:
    """Makes the folder that is written to.

    Raises:
      ValueError: two images would be written to one name.
      OSError: the folder cannot be made.
    """
    first = {}
    for path in paths:
        to_picture, *_ = _outputs(path, folder)
        if first.setdefault(to_picture, path) != path:
            raise ValueError(f"{first[to_picture]} and {path}: expected other names, both become {to_picture}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)


def _outputs(path: Path, folder: Path | None) -> tuple[Path, Path, Path]:
    """The picture, the label map and the JSON of an image, in `folder` or, without one, beside it."""
    return tuple((folder or path.parent) / f"{path.stem}{ending}" for ending in (PICTURE, LABELS, NUMBERS))


def write(seen: Seen, names: Sequence[str], folder: Path | None) -> None:
    """Writes the picture, JSON (COCO's results, a list) and, of a segmenter, the label map with its palette.

    Raises:
      OSError: one cannot be written.
    """
    to_picture, to_labels, to_numbers = _outputs(seen.path, folder)
    written = as_dict(seen, names)
    picture(seen, names).save(to_picture, "png")
    if seen.label_map is not None:
        draw.label_image(seen.label_map).save(to_labels, "png")
        written["label_map"] = to_labels.name
    write_atomically(to_numbers, json.dumps(written.get("results", written), indent=1) + "\n")
