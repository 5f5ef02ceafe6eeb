"""Object detection and instance segmentation: boxes, and masks where the network has them; AP out."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from ml_collections import ConfigDict

from vitpyramid.data import dense_pipeline
from vitpyramid.evals import coco
from vitpyramid.heads.detector import Detections, Targets, rescale
from vitpyramid.heads.mask_rcnn import MaskRCNN
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.retinanet import RetinaNet
from vitpyramid.tasks import dense
from vitpyramid.tasks.dense import View
from vitpyramid.tasks.metrics import Metrics
from vitpyramid.tasks.task import Batch, Task, config_errors

BEST = "box_AP"
RULES = dense.RULES | {"model.name": dense.networks(RetinaNet, MaskRCNN)}


def check(config: ConfigDict, evaluation: bool) -> list[str]:
    """What keys contradict each other, a line each; `evaluation`: nothing will be trained."""
    del evaluation
    problems = dense.check(config)
    learns_masks = config.model.name.startswith("mask_rcnn")
    if learns_masks != config.data.masks:
        problems.append(f"data.masks = {config.data.masks}: expected {learns_masks} with {config.model.name}")
    return problems


def make_task(config: ConfigDict) -> Task:
    """The task of a config that `train.config.validate` has accepted.

    Raises:
      ConfigError: `model.num_classes` is 0 and the data cannot be opened. The task's functions that open files raise it
        where the config does not fit them.
    """
    config = dense.with_classes(config)
    model = dense.make_model(config)
    open_split = functools.cache(functools.partial(dense.open_split, config))
    hosts = (jax.process_index(), jax.process_count())
    answers = coco.Answers(
        ground_truth=functools.cache(lambda: open_split(False).ground_truth()),
        image_ids=functools.cache(lambda: open_split(False).ids),
        category_ids=lambda: open_split(False).category_ids,
    )

    def train_batches(step: int):
        with config_errors():
            return dense_pipeline.make_train(config, open_split(True), step, *hosts)

    def eval_batches():
        with config_errors():
            return dense_pipeline.make_eval(config, open_split(False), *hosts)

    def prepare(key: jax.Array, batch: Batch, constants: dict) -> tuple[View, Batch]:
        del key, constants
        x = prepare_eval(batch)
        return x.replace(targets=targets_of(batch)), dense.counted(batch)

    def prepare_eval(batch: Batch) -> View:
        return View(dense.canvas(batch, config, model.dtype), batch["size"])

    def measure(detections: Detections, batch: Batch) -> Metrics:
        # detectron2 cuts boxes at the image's border afterwards, mmdetection did so before.
        limits = batch["original_size"] if model.library == "detectron2" else None
        found = rescale(detections, batch["scale"], limits)
        found = coco.Found.of(found, batch["original_size"], batch["index"], batch["mask"], answers)
        return {"found": found} | dense.sums(dense.counted(batch))

    return Task(
        config=config,
        title=f"{config.model.name} on {config.data.name}",
        unit="images",
        model=model,
        network=dense.network(config),
        num_examples=lambda: len(open_split(True)),
        batch=functools.partial(dense.batch, config, open_split),
        train_batches=train_batches,
        eval_batches=eval_batches,
        prepare=prepare,
        prepare_eval=prepare_eval,
        call=call,
        loss=loss,
        measure=measure,
        words=words,
        files=lambda metrics: metrics["found"].files(),
        best=BEST,
        about=lambda: {"classes": list(open_split(True).categories)},
        initial=lambda: dense.load_initial(config, model),
    )


def call(network: DenseNetwork, x: View, train: bool = False) -> dict[str, jax.Array] | Detections:
    """The network's losses in training, else what it detects."""
    if train:
        return network.losses(x.images, x.targets, x.sizes, train)
    return network.detect(x.images, x.sizes, train)


def targets_of(batch: Batch) -> Targets:
    """The ground truth of a batch; its masks are packed, eight columns a byte."""
    masks = None
    if "masks" in batch:
        masks = jnp.unpackbits(batch["masks"], axis=-1, count=batch["image"].shape[2]).astype(bool)
    return Targets(batch["boxes"], batch["labels"], batch["valid"], masks)


def loss(losses: Mapping[str, jax.Array], counted: Batch) -> tuple[jax.Array, Metrics]:
    """The sum of a network's losses, each of them, and how many rows were `counted`."""
    sums = {name: value.sum() for name, value in losses.items()}
    metrics = {name: clu_metrics.Average.from_model_output(value) for name, value in sums.items()}
    return sum(sums.values()), metrics | dense.sums(counted)


def words(values: Mapping[str, float]) -> str:
    """`loss 0.1234  loss_cls 0.1000`, `box_AP 36.7  box_AP50 56.9  box_AP75 38.9`; what was left out, if anything."""
    text = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith("loss")]
    kinds = ("_AP", "_AP50", "_AP75")
    text += [f"{name} {100 * value:.1f}" for name, value in values.items() if name.endswith(kinds)]
    if values.get("skipped"):
        text.append(f"{values['skipped']:.0f} images skipped")
    return "  ".join(text)
