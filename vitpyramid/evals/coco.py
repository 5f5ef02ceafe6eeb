"""COCO's average precision of boxes and of masks, and the files of results that its server takes.

The numbers are those of pycocotools.
"""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
from clu import metrics
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitpyramid.heads.detector import Detections
from vitpyramid.heads.masks import paste

BOXES, MASKS = "bbox", "segm"
MOST = (1, 10, 100)  # detections of an image and class that count
_NAMES = {BOXES: "box", MASKS: "mask"}
_AREAS = ("all", "small", "medium", "large")  # in the library's order


class Precision(NamedTuple):
    """What an evaluation found; -1 where there is nothing to be found.

    Attributes:
      numbers: COCO's twelve, in [0, 1]: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.
      classes: AP by category, in the order of their ids.
    """

    numbers: dict[str, float]
    classes: dict[str, float]


def average_precision(ground_truth: Mapping, results: Sequence[Mapping], kind: str, most=MOST) -> Precision:
    """AP and AR of results against a COCO annotation file's contents.

    Args:
      ground_truth: `images`, `annotations` and `categories`; crowds take any number of detections and count for none.
      results: as `results_of` makes them; of several with one score the first counts first.
      kind: `BOXES` or `MASKS`: what overlaps are of, and whose areas are small or large where nothing is matched.
      most: detections of an image and class that count: three numbers, of which the last is that of AP.

    Raises:
      ValueError: results of images or categories that the ground truth does not have.
    """
    for key, known in (("image_id", "images"), ("category_id", "categories")):
        if strange := {result[key] for result in results} - {one["id"] for one in ground_truth[known]}:
            raise ValueError(f"results have {key} {min(strange)}, which is none of the ground truth's {known}")
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints
        truth = _indexed(ground_truth, ground_truth["annotations"])
        of_kind = _of_kind(results, kind)
        found = truth.loadRes(of_kind) if of_kind else _indexed(ground_truth, [])
        judge = COCOeval(truth, found, kind)
        judge.params.maxDets = list(most)
        judge.evaluate()
        judge.accumulate()
    # [IoU threshold, recall, class, area, most] and the same without recall.
    precision, recall = judge.eval["precision"], judge.eval["recall"]
    numbers = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[0, :, :, 0, -1]),
        "AP75": _mean(precision[5, :, :, 0, -1]),
        **{f"AP{area[0]}": _mean(precision[:, :, :, i, -1]) for i, area in enumerate(_AREAS) if i},
        **{f"AR{count}": _mean(recall[:, :, 0, i]) for i, count in enumerate(most)},
        **{f"AR{area[0]}": _mean(recall[:, :, i, -1]) for i, area in enumerate(_AREAS) if i},
    }
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    return Precision(
        numbers, {names[one]: _mean(precision[:, :, i, 0, -1]) for i, one in enumerate(judge.params.catIds)}
    )


def _indexed(ground_truth: Mapping, annotations: Sequence[Mapping]) -> COCO:
    indexed = COCO()
    # Copied: the library writes into annotations.
    indexed.dataset = {**ground_truth, "annotations": [dict(annotation) for annotation in annotations]}
    indexed.createIndex()
    return indexed


def _of_kind(results: Sequence[Mapping], kind: str) -> list[dict]:
    # With both in it the library takes the box's area for that of the mask.
    keys = ("image_id", "category_id", "score", {BOXES: "bbox", MASKS: "segmentation"}[kind])
    return [{key: result[key] for key in keys} for result in results]


def _mean(values: np.ndarray) -> float:
    """Over the classes that there is something of."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def results_of(
    found: Detections, sizes: np.ndarray, image_ids: Sequence, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections as COCO's results: `image_id`, `category_id`, `score`, `bbox` (x, y, width, height), `segmentation`.

    Args:
      found: arrays on the host, boxes in pixels of the original images.
      sizes: int `[B, 2]`, heights and widths of these.
      image_ids: of the B images; None leaves one out.
      category_ids: by class.
    """
    results = []
    for row, image_id in enumerate(image_ids):
        if image_id is None:
            continue
        there = np.flatnonzero(found.valid[row])
        boxes = np.asarray(found.boxes[row], np.float64)[there]
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
        of_image = [
            {"image_id": image_id, "category_id": category_ids[label], "score": score, "bbox": box}
            for label, score, box in zip(
                found.labels[row, there].tolist(), found.scores[row, there].tolist(), corners, strict=True
            )
        ]
        if found.masks is not None and len(there):
            for result, mask, box in zip(of_image, found.masks[row, there], boxes, strict=True):
                result["segmentation"] = encode(paste(mask[None], box[None], tuple(sizes[row]))[0])
        results += of_image
    return results


def encode(mask: np.ndarray) -> dict:
    """A bool mask `[H, W]` as COCO's compressed run lengths, fit for JSON."""
    packed = run_lengths.encode(np.asfortranarray(mask, np.uint8))
    counts = packed["counts"]
    return {
        "size": [int(side) for side in packed["size"]],
        "counts": counts if isinstance(counts, str) else counts.decode(),
    }


class Answers(NamedTuple):
    """What detections are held against; called when they are there.

    Attributes:
      ground_truth: `() -> ` what `average_precision` takes.
      image_ids, category_ids: `() -> ` ids by place in the data and by class.
    """

    ground_truth: Callable[[], Mapping]
    image_ids: Callable[[], Sequence]
    category_ids: Callable[[], Sequence[int]]


@flax.struct.dataclass
class Found(metrics.Metric):
    """Detections of an evaluation; AP is no sum over images, so all of them come to the host.

    Attributes:
      found: of a batch, `{"detections", "sizes", "index", "mask"}`; merged, the list that `results_of` makes: masks
        are kept as run lengths.
      kinds: `BOXES`, and `MASKS` of those who predict them.
      answers: what they are held against.
    """

    found: Any
    kinds: tuple[str, ...] = flax.struct.field(pytree_node=False)
    answers: Answers = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, detections: Detections, sizes: jax.Array, index: jax.Array, mask: jax.Array, answers: Answers
    ) -> "Found":
        """Those of a batch.

        Args:
          detections: boxes in pixels of the original images.
          sizes: int32 `[B, 2]`, heights and widths of these.
          index: int32 `[B]`, their places in the data.
          mask: `[B]`, 0 of rows that are to be left out.
        """
        kinds = (BOXES,) if detections.masks is None else (BOXES, MASKS)
        return cls({"detections": detections, "sizes": sizes, "index": index, "mask": mask}, kinds, answers)

    @functools.cached_property
    def results(self) -> list[dict]:
        """As `results_of` makes them."""
        if isinstance(self.found, list):
            return self.found
        found, ids = jax.device_get(self.found), self.answers.image_ids()
        there = zip(found["index"], found["mask"], strict=True)
        image_ids = [ids[index] if real else None for index, real in there]
        return results_of(found["detections"], found["sizes"], image_ids, self.answers.category_ids())

    def merge(self, other: "Found") -> "Found":
        """Those of both."""
        return self.replace(found=[*self.results, *other.results])

    @functools.cached_property
    def precision(self) -> dict[str, Precision]:
        """By kind."""
        truth = self.answers.ground_truth()
        return {kind: average_precision(truth, self.results, kind) for kind in self.kinds}

    def compute(self) -> dict[str, float]:
        """COCO's numbers as `box_AP`, ..., and of masks as `mask_AP`, ...; with how many `detections`."""
        numbers = {
            f"{_NAMES[kind]}_{name}": value
            for kind, precision in self.precision.items()
            for name, value in precision.numbers.items()
        }
        return numbers | {"detections": len(self.results)}

    def files(self) -> dict[str, str]:
        """By name: results as COCO's server takes them, one file a kind, and a table of AP by category."""
        written = {f"detections.{kind}.json": json.dumps(_of_kind(self.results, kind)) for kind in self.kinds}
        return written | {"classes.txt": class_table(self.precision)}


def class_table(precision: Mapping[str, Precision]) -> str:
    """AP in percent, a line a category, "-" where the data has nothing of it."""
    names = list(next(iter(precision.values())).classes)
    width = max(map(len, ("category", *names)))
    lines = [f"{'category':{width}}" + "".join(f"  {_NAMES[kind] + ' AP':>7}" for kind in precision)]
    for name in names:
        values = (of_kind.classes[name] for of_kind in precision.values())
        lines.append(
            f"{name:{width}}" + "".join(f"  {'-' if value < 0 else f'{value:.1%}'[:-1]:>7}" for value in values)
        )
    return "\n".join(lines) + "\n"
