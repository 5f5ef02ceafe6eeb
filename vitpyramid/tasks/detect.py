"""Object detection and instance segmentation: boxes, and masks where the network has them; AP out."""

import functools
from collections.abc import Callable, Mapping

import jax
from ml_collections import ConfigDict

from vitpyramid.data.annotated import Annotated
from vitpyramid.evals import coco
from vitpyramid.heads.deformable_detr import DeformableDETR
from vitpyramid.heads.detector import Detections, Targets, rescale
from vitpyramid.heads.detr import DETR
from vitpyramid.heads.mask_rcnn import MaskRCNN
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.retinanet import RetinaNet
from vitpyramid.tasks import dense, options
from vitpyramid.tasks.dense import View
from vitpyramid.tasks.metrics import Metrics
from vitpyramid.tasks.task import Batch, Task

BEST = "box_AP"
RULES = dense.RULES | {"model.name": dense.networks(RetinaNet, MaskRCNN, DETR, DeformableDETR)}


def check(config: ConfigDict, evaluation: bool) -> list[str]:
    """What keys contradict each other, a line each; `evaluation`: nothing will be trained."""
    del evaluation
    problems = dense.check(config)
    learns_masks = config.model.name.startswith("mask_rcnn")
    if learns_masks != config.data.masks:
        problems.append(f"data.masks = {config.data.masks}: expected {learns_masks} with {config.model.name}")
    return problems


def make_task(config: ConfigDict) -> Task:
    """As `dense.make_task`."""
    return dense.make_task(_own, config)


def _own(config: ConfigDict, model: DenseNetwork, open_split: Callable[[bool], Annotated]) -> dict:
    answers = coco.Answers(
        ground_truth=functools.cache(lambda: open_split(False).ground_truth()),
        image_ids=functools.cache(lambda: open_split(False).ids),
        category_ids=lambda: open_split(False).category_ids,
    )

    def measure(detections: Detections, batch: Batch) -> Metrics:
        # detectron2 cuts boxes at the image's border afterwards, mmdetection did so before.
        limits = batch["original_size"] if model.library == "detectron2" else None
        found = rescale(detections, batch["scale"], limits)
        found = coco.Found.of(found, batch["original_size"], batch["index"], batch["mask"], answers)
        return {"found": found} | dense.sums(dense.counted(batch))

    return {
        "targets": targets_of,
        "call": call,
        "measure": measure,
        "words": words,
        "files": lambda metrics: metrics["found"].files(),
        "best": BEST,
        "about": lambda: about(open_split(True)),
    }


def about(source: Annotated) -> dict[str, list]:
    """Names of classes by label, and their ids in results: COCO's, or those of one's own JSON."""
    return {"classes": list(source.categories), "category_ids": list(source.category_ids)}


def call(network: DenseNetwork, x: View, train: bool = False) -> dict[str, jax.Array] | Detections:
    """The network's losses in training, else what it detects."""
    if train:
        return network.losses(x.images, x.targets, x.sizes, train)
    return network.detect(x.images, x.sizes, train)


def targets_of(batch: Batch) -> Targets:
    """The ground truth of a batch."""
    return Targets(batch["boxes"], batch["labels"], batch["valid"], batch.get("masks"))


def words(values: Mapping[str, float]) -> str:
    """`loss 0.1234  loss_cls 0.1000`, `box_AP 36.7  box_AP50 56.9  box_AP75 38.9`; what was left out, if anything."""
    text = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith("loss")]
    kinds = ("_AP", "_AP50", "_AP75")
    text += [f"{name} {100 * value:.1f}" for name, value in values.items() if name.endswith(kinds)]
    if values.get("dropped"):
        text.append(f"{values['dropped']:.0f} objects beyond data.max_boxes")
    return "  ".join([*text, *options.skipped(values)])
