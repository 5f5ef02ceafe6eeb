"""RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.

The defaults are mmdetection's (2.13), with which PVT's detectors were trained; `DETECTRON2` has what is otherwise in
detectron2, with which ResT's were. Equal to both, in float64 and on the same weights.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.heads import anchors, losses
from vitpyramid.heads import boxes as box
from vitpyramid.heads.detector import Detections, Targets, whole
from vitpyramid.heads.fpn import FPN
from vitpyramid.heads.layers import convolution, per_anchor
from vitpyramid.heads.matching import assign
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.nms import nms
from vitpyramid.heads.selection import top_k
from vitpyramid.models.backbone import Level
from vitpyramid.models.initialisers import fan_in_uniform, xavier_uniform
from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.sharding import map_rows

# What detectron2 does otherwise; see the attributes of `RetinaNet`.
DETECTRON2 = {
    "library": "detectron2",
    "anchor_order": "size",
    "low_quality": "label",
    "learns_padding": True,
    "clamp_below": False,
    "relu_before_p7": True,
    "neck_init": fan_in_uniform,
    "normaliser": "moving",
    "candidates": "pairs",
    "clip_first": False,
}


@flax.struct.dataclass
class Predictions:
    """Of every anchor, by level, in the anchors' order.

    Attributes:
      levels: the pyramid that they are made from.
      logits: `[B, n, K]` a level.
      deltas: `[B, n, 4]` a level.
    """

    levels: tuple[Level, ...]
    logits: tuple[jax.Array, ...]
    deltas: tuple[jax.Array, ...]


class RetinaHead(nn.Module):
    """Two towers of convolutions, shared by all levels (section 4, Figure 3)."""

    num_classes: int
    per_cell: int
    channels: int
    depth: int
    dtype: jnp.dtype

    def setup(self):
        conv = functools.partial(convolution, dtype=self.dtype)
        self.cls_convs = [conv(self.channels, 3) for _ in range(self.depth)]
        self.reg_convs = [conv(self.channels, 3) for _ in range(self.depth)]
        # At the start every anchor is background with probability .99 (section 3.3).
        self.retina_cls = conv(self.per_cell * self.num_classes, 3, bias=-math.log(99))
        self.retina_reg = conv(self.per_cell * 4, 3)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, h, w, C]` -> logits `[B, h * w * A, K]` and deltas `[B, h * w * A, 4]`."""
        of_class = of_box = x
        for conv in self.cls_convs:
            of_class = nn.relu(conv(of_class))
        for conv in self.reg_convs:
            of_box = nn.relu(conv(of_box))
        logits = per_anchor(self.retina_cls(of_class), self.num_classes)
        deltas = per_anchor(self.retina_reg(of_box), 4)
        return tuple(out.astype(at_least_float32(self.dtype)) for out in (logits, deltas))


class RetinaNet(DenseNetwork, kw_only=True):
    """Dense detection on a pyramid, with two levels behind the backbone's (P6 and P7).

    Attributes:
      channels: of the pyramid and of the heads.
      depth: convolutions of a tower.
      scales: of anchors, in strides: three a octave from 4.
      images_per_group: images whose positives are the divisor of their losses; None: the whole batch.
      most_candidates: of a level, before suppression.
      score_threshold, iou_threshold, most_detections: of what is kept; detections of a class suppress each other.

    Attributes where the libraries differ:
      library: whose names the weights have in PyTorch.
      anchor_order: in a cell, `anchors.base_anchors`.
      low_quality: `matching.assign`.
      learns_padding: anchors in the canvas beyond the image are background; otherwise they are not learned from.
      clamp_below: `boxes.decode`.
      relu_before_p7: `FPN`.
      neck_init: of kernels of the FPN.
      normaliser: of losses: "positives": their number, an image without any counting as one; "moving": the running
        mean of that number, which starts at 100 and is `loss_normaliser` in `batch_stats`.
      candidates: the best "anchors" of a level by their best class, then what is above the threshold; or the best
        "pairs" of anchor and class above the threshold.
      clip_first: boxes are cut at the image's border before suppression, not after `rescale`.
    """

    channels: int = 256
    depth: int = 4
    scales: tuple[float, ...] = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    images_per_group: int | None = None
    most_candidates: int = 1000
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    most_detections: int = 100
    library: str = "mmdetection"
    anchor_order: str = "ratio"
    low_quality: str = "match"
    learns_padding: bool = False
    clamp_below: bool = True
    relu_before_p7: bool = False
    neck_init: Callable = xavier_uniform
    normaliser: str = "positives"
    candidates: str = "anchors"
    clip_first: bool = True

    after = ("neck", "bbox_head")
    class_layer = "bbox_head/retina_cls"

    @nn.nowrap
    def classes_of(self, rows: int) -> int:
        """Of a class layer with `rows` outputs: one of each class for each anchor of a cell."""
        return rows // self.per_cell

    @property
    def per_cell(self) -> int:
        """Anchors of a cell."""
        return len(self.scales) * len(anchors.RATIOS)

    @staticmethod
    def levels_of(strides: Sequence[int]) -> tuple[int, ...]:
        """Those coarser than 4: the pyramid begins with P3."""
        return tuple(i for i, stride in enumerate(strides) if stride > 4)

    def setup(self):
        self.neck = FPN(
            self.channels, extra=2, relu_between=self.relu_before_p7, kernel_init=self.neck_init, dtype=self.dtype
        )
        self.bbox_head = RetinaHead(self.num_classes, self.per_cell, self.channels, self.depth, self.dtype)
        if self.normaliser == "moving":
            self.loss_normaliser = self.variable("batch_stats", "loss_normaliser", lambda: jnp.asarray(100.0))

    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """Detections in images that fill the canvas."""
        return self.detect(images, train=train)

    def predict(self, images: jax.Array, train: bool = False) -> Predictions:
        """What the heads say of a canvas `[B, H, W, 3]`."""
        levels = self.pyramid(images, train)
        logits, deltas = zip(*(self.bbox_head(level.x) for level in levels), strict=True)
        return Predictions(levels, logits, deltas)

    @nn.nowrap
    def anchors(self, levels: tuple[Level, ...]) -> tuple[np.ndarray, ...]:
        """`[h * w * A, 4]` of every level."""
        return anchors.pyramid_anchors(levels, self.scales, self.anchor_order, at_least_float32(self.dtype))

    @nn.nowrap
    def assign(self, levels: tuple[Level, ...], targets: Targets, sizes: jax.Array):
        """`Assignment` `[B, N]` of all levels' anchors."""
        batch = len(targets.boxes)
        if self.learns_padding:
            learned = jnp.ones((batch, sum(len(of) for of in self.anchors(levels))), bool)
        else:
            learned = anchors.inside_pyramid(levels, sizes, self.per_cell)
        rule = functools.partial(assign, positive=0.5, negative=0.4, low_quality=self.low_quality)

        def of_image(boxes, valid, inside):
            return rule(box.overlaps(boxes, np.concatenate(self.anchors(levels))), valid, inside)

        return map_rows(of_image, targets.boxes, targets.valid, learned)

    def losses(
        self, images: jax.Array, targets: Targets, sizes: jax.Array | None = None, train: bool = True
    ) -> dict[str, jax.Array]:
        """Focal loss of classes and L1 loss of positives' deltas, `[levels]` each; the loss is the sum of all.

        Where `normaliser` is "moving", `batch_stats` must be mutable for the running mean to be updated, which comes
        before it is used.
        """
        predictions = self.predict(images, train)
        return self.losses_of(predictions, targets, whole(images, sizes))

    def losses_of(self, predictions: Predictions, targets: Targets, sizes: jax.Array) -> dict[str, jax.Array]:
        """As `losses`, of predictions."""
        label, match = self.assign(predictions.levels, targets, sizes)
        all_anchors = np.concatenate(self.anchors(predictions.levels))
        logits, deltas = (jnp.concatenate(of, axis=1) for of in (predictions.logits, predictions.deltas))
        positive = label == 1

        classes = jnp.take_along_axis(targets.labels, match, axis=1)
        wanted = jax.nn.one_hot(jnp.where(positive, classes, -1), self.num_classes, dtype=logits.dtype)
        of_class = jnp.where(label[..., None] >= 0, losses.focal(logits, wanted), 0).sum(-1)

        truth = jnp.take_along_axis(targets.boxes, match[..., None], axis=1)
        wanted = jnp.where(positive[..., None], box.encode(all_anchors, truth), 0)
        of_box = jnp.where(positive[..., None], jnp.abs(deltas - wanted), 0).sum(-1)

        lengths = tuple(logits.shape[1] for logits in predictions.logits)
        sums = {
            "loss_cls": losses.by_level(of_class, lengths),
            "loss_bbox": losses.by_level(of_box, lengths),
        }
        divisors = self._divisors(positive.sum(axis=1).astype(logits.dtype))
        return {key: losses.per_group(value, divisors, self.images_per_group) for key, value in sums.items()}

    def _divisors(self, positives: jax.Array) -> jax.Array:
        """`[B]`: each image's part in what losses are divided by, from the number of its positives."""
        if self.normaliser == "positives":
            return jnp.maximum(positives, 1)
        batch = len(positives)
        images = self.images_per_group or batch
        number = jnp.maximum(positives.reshape(-1, images).sum(axis=1), 1).mean()
        mean = 0.9 * self.loss_normaliser.value + 0.1 * number
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            self.loss_normaliser.value = mean
        return jnp.full(batch, mean / images)

    def detect(self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False) -> Detections:
        """What is in the images: boxes above the score threshold that no better one of their class covers."""
        return self.detections_of(self.predict(images, train), whole(images, sizes))

    @nn.nowrap
    def detections_of(self, predictions: Predictions, sizes: jax.Array) -> Detections:
        """As `detect`, of predictions."""

        def of_image(logits, deltas, size):
            of_levels = zip(logits, deltas, map(jnp.asarray, self.anchors(predictions.levels)), strict=True)
            candidates = [self._candidates(*of_level, size) for of_level in of_levels]
            boxes, scores, classes, there = (jnp.concatenate(of) for of in zip(*candidates, strict=True))
            kept = nms(boxes, scores, there, self.iou_threshold, self.most_detections, classes)
            labels = jnp.where(kept.valid, classes[kept.index], 0)
            return Detections(kept.boxes, kept.scores, labels.astype(jnp.int32), kept.valid)

        return map_rows(of_image, predictions.logits, predictions.deltas, sizes)

    @nn.nowrap
    def _candidates(self, logits: jax.Array, deltas: jax.Array, of_level: jax.Array, size: jax.Array):
        """Boxes, scores, classes of a level, and whether they are above the threshold, before suppression."""
        n, k = logits.shape
        scores = jax.nn.sigmoid(logits)
        decode = functools.partial(box.decode, clamp_below=self.clamp_below)
        if self.candidates == "pairs":
            scores = jnp.where(scores > self.score_threshold, scores, 0).ravel()
            scores, pair = top_k(scores, min(self.most_candidates, n * k))
            anchor, classes = pair // k, pair % k
            boxes = decode(of_level[anchor], deltas[anchor])
        else:
            if n > self.most_candidates:
                _, anchor = top_k(scores.max(axis=1), self.most_candidates)
                of_level, deltas, scores = of_level[anchor], deltas[anchor], scores[anchor]
            boxes, classes = jnp.repeat(decode(of_level, deltas), k, axis=0), jnp.tile(jnp.arange(k), len(deltas))
            scores = scores.ravel()
        if self.clip_first:
            boxes = box.clip(boxes, size)
        return boxes, scores, classes, scores > self.score_threshold
