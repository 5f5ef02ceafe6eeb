"""Semantic segmentation: a class of every pixel; mIoU out."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from ml_collections import ConfigDict

from vitpyramid.data.annotated import Annotated
from vitpyramid.data.annotations import label_map_of
from vitpyramid.evals import segmentation
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.semantic_fpn import SemanticFPN
from vitpyramid.tasks import dense, options
from vitpyramid.tasks.dense import View
from vitpyramid.tasks.metrics import Metrics
from vitpyramid.tasks.task import Batch, Task

BEST = "mIoU"
RULES = {"model.name": dense.networks(SemanticFPN)}
_ROWS = 16  # of a class map that are made at a time


def check(config: ConfigDict, evaluation: bool) -> list[str]:
    """What keys contradict each other, a line each; `evaluation`: nothing will be trained."""
    del evaluation
    problems = dense.check(config)
    if config.model.num_classes > segmentation.IGNORED:
        problems.append(f"model.num_classes = {config.model.num_classes}: expected at most {segmentation.IGNORED}")
    return problems


def make_task(config: ConfigDict) -> Task:
    """As `dense.make_task`."""
    return dense.make_task(_own, config)


def _own(config: ConfigDict, model: DenseNetwork, open_split: Callable[[bool], Annotated]) -> dict:
    del model

    @functools.cache
    def largest() -> tuple[int, int]:
        height, width = open_split(False).sizes().max(axis=0).tolist()
        return -(-height // _ROWS) * _ROWS, width

    def measure(logits: jax.Array, batch: Batch) -> Metrics:
        sizes = batch["size"], batch["original_size"]
        maps = class_maps(logits, *sizes, batch["image"].shape[1:3], largest())
        found = {"maps": maps, "sizes": batch["original_size"], "index": batch["index"], "mask": batch["mask"]}
        return {"found": Confusion(found, Labels(label_of, names))} | dense.sums(dense.counted(batch))

    def label_of(index: int) -> np.ndarray:
        return label_map_of(open_split(False)[index], config.model.num_classes)

    def names() -> tuple[str, ...]:
        return open_split(False).categories

    return {
        "targets": lambda batch: batch["label"],
        "call": call,
        "measure": measure,
        "words": words,
        "files": lambda metrics: {"classes.txt": metrics["found"].table()},
        "best": BEST,
        "about": lambda: {"classes": list(names())},
    }


def call(network: DenseNetwork, x: View, train: bool = False) -> dict[str, jax.Array] | jax.Array:
    """The network's losses in training, else logits `[B, h, w, K]`."""
    return network.losses(x.images, x.targets, train) if train else network(x.images, train)


class Labels(NamedTuple):
    """What class maps are held against; called when they are there.

    Attributes:
      label_of: `index -> ` label map `[H, W]` of an image at its place in the data.
      names: `() -> ` names of the classes.
    """

    label_of: Callable[[int], np.ndarray]
    names: Callable[[], tuple[str, ...]]


@flax.struct.dataclass
class Confusion(clu_metrics.Metric):
    """Pixels by label and prediction; sums over images, made on the host, where label maps have their own sizes.

    Attributes:
      found: of a batch, `{"maps", "sizes", "index", "mask"}`; merged, int64 `[K, K]`.
      labels: what maps are held against.
    """

    found: Any
    labels: Labels = flax.struct.field(pytree_node=False)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 `[K, K]`, as `segmentation.confusion` gives it, of the rows whose `mask` is not 0."""
        if not isinstance(self.found, dict):
            return self.found
        found, total = jax.device_get(self.found), np.zeros((len(self.labels.names()),) * 2, np.int64)
        for row in np.flatnonzero(found["mask"]):
            height, width = found["sizes"][row]
            label = self.labels.label_of(int(found["index"][row]))
            total += segmentation.confusion(found["maps"][row, :height, :width], label, len(total))
        return total

    def merge(self, other: "Confusion") -> "Confusion":
        """Of the images of both."""
        return self.replace(found=self.counts + other.counts)

    def compute(self) -> dict[str, float]:
        """`mIoU`, `mAcc` and `aAcc`."""
        return segmentation.scores(self.counts).numbers

    def table(self) -> str:
        """IoU and accuracy in percent, a line a class, "-" where there is nothing of it."""
        _, iou, accuracy = segmentation.scores(self.counts)
        names = self.labels.names()
        width = max(map(len, ("class", *names)))
        lines = [f"{'class':{width}}      IoU      Acc"]
        for name, *values in zip(names, iou, accuracy, strict=True):
            percent = ("-" if np.isnan(value) else f"{100 * value:.2f}" for value in values)
            lines.append(f"{name:{width}}" + "".join(f"  {text:>7}" for text in percent))
        return "\n".join(lines) + "\n"


def class_maps(
    logits: jax.Array, sizes: jax.Array, originals: jax.Array, canvas: tuple[int, int], largest: tuple[int, int]
) -> jax.Array:
    """The class of every pixel of images as they were before they were resized.

    Logits are resized to the image in the canvas, and from there to the original, bilinear both times, as in
    mmsegmentation (0.13); one product of matrices for an axis, `_ROWS` rows of the result at a time.

    Args:
      logits: `[B, h, w, K]`, K at most 256.
      sizes: int32 `[B, 2]`, heights and widths in the canvas.
      originals: int32 `[B, 2]`, those of the originals.
      canvas: height and width of what the network saw.
      largest: of the result; the height is a multiple of `_ROWS`.

    Returns:
      uint8 `[B, *largest]`; what is beyond `originals` says nothing.
    """

    def of_image(logits: jax.Array, size: jax.Array, original: jax.Array) -> jax.Array:
        rows, columns = (
            jnp.matmul(
                _resampling(largest[axis], canvas[axis], size[axis] / original[axis], size[axis]),
                _resampling(canvas[axis], cells, cells / canvas[axis], -(-size[axis] * cells // canvas[axis])),
                precision="highest",
            )
            for axis, cells in enumerate(logits.shape[:2])
        )
        wide = jnp.einsum("Ww,hwk->hWk", columns, logits, precision="highest")
        blocks = rows.reshape(-1, _ROWS, rows.shape[-1])
        best = jax.lax.map(lambda block: jnp.einsum("Hh,hWk->HWk", block, wide, precision="highest").argmax(-1), blocks)
        return best.astype(jnp.uint8).reshape(largest)

    return jax.vmap(of_image)(logits, sizes, originals)


def _resampling(new_size: int, size: int, ratio: jax.Array, filled: jax.Array) -> jax.Array:
    """Matrix `[new_size, size]` that resamples an axis at every `ratio` cells, of which only so many are `filled`."""
    centres = jnp.clip((jnp.arange(new_size) + 0.5) * ratio - 0.5, 0, filled - 1)
    return jnp.maximum(1 - jnp.abs(centres[:, None] - jnp.arange(size)), 0)


def words(values: Mapping[str, float]) -> str:
    """`loss 0.1234`, `mIoU 41.90  mAcc 53.20  aAcc 79.50`, and the number of skipped images if it is not 0."""
    text = [f"{name} {value:.4f}" for name, value in values.items() if name == "loss"]
    kinds = ("mIoU", "mAcc", "aAcc")
    text += [f"{name} {100 * value:.2f}" for name, value in values.items() if name.endswith(kinds)]
    return "  ".join([*text, *options.skipped(values)])
