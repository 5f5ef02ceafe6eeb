"""What is done to every proposal: its class, its box and its mask.

Ren et al., "Faster R-CNN", NeurIPS 2015; He et al., "Mask R-CNN", ICCV 2017, section 3 and Figure 4 (right).
"""

import functools
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.heads import boxes as box
from vitpyramid.heads import losses
from vitpyramid.heads.detector import Detections, Targets
from vitpyramid.heads.layers import convolution
from vitpyramid.heads.masks import mask_targets
from vitpyramid.heads.matching import assign, sample
from vitpyramid.heads.nms import nms
from vitpyramid.heads.roi_align import level_of, pyramid_roi_align
from vitpyramid.heads.rpn import Proposals
from vitpyramid.models.backbone import Level
from vitpyramid.models.initialisers import fan_out_normal, gaussian
from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.sharding import map_rows

STDS = (0.1, 0.1, 0.2, 0.2)  # of deltas
BOX_BINS, MASK_BINS = 7, 14


@flax.struct.dataclass
class Regions:
    """Proposals that are learned from, `n` slots an image: first positives, then background.

    Attributes:
      boxes: `[B, n, 4]`.
      labels: int32 `[B, n]`: class, K for background.
      match: int32 `[B, n]`: the box of the ground truth, of positives.
      positive, valid: bool `[B, n]`.
      index: int32 `[B, n]`: among ground truth and proposals together.
    """

    boxes: jax.Array
    labels: jax.Array
    match: jax.Array
    positive: jax.Array
    valid: jax.Array
    index: jax.Array


class BoxHead(nn.Module):
    """Two layers, then class and box of every class."""

    num_classes: int
    channels: int
    kernel_init: Callable
    dtype: jnp.dtype

    def setup(self):
        layer = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        self.shared_fcs = [
            nn.DenseGeneral(self.channels, axis=(-3, -2, -1), **layer),  # a kernel of the whole region
            nn.Dense(self.channels, **layer),
        ]
        self.fc_cls = nn.Dense(self.num_classes + 1, dtype=self.dtype, kernel_init=gaussian(0.01))
        self.fc_reg = nn.Dense(self.num_classes * 4, dtype=self.dtype, kernel_init=gaussian(0.001))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[..., 7, 7, C]` -> logits `[..., K + 1]`, background last, and deltas `[..., K, 4]`."""
        for layer in self.shared_fcs:
            x = nn.relu(layer(x))
        dtype = at_least_float32(self.dtype)
        deltas = self.fc_reg(x).astype(dtype)
        return self.fc_cls(x).astype(dtype), deltas.reshape(*x.shape[:-1], self.num_classes, 4)


class Upsample(nn.Module):
    """Transposed convolution, kernel 2 and stride 2: every pixel becomes four."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[N, h, w, C]` -> `[N, 2 * h, 2 * w, features]`."""
        n, h, w, c = x.shape
        kernel = self.param("kernel", fan_out_normal, (2, 2, c, self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        out = jnp.einsum("nhwc,ijcf->nhiwjf", x, kernel)
        return out.reshape(n, 2 * h, 2 * w, self.features) + bias


class MaskHead(nn.Module):
    """Four convolutions, twice the size, a map of every class."""

    num_classes: int
    channels: int
    logits_init: Callable
    dtype: jnp.dtype

    def setup(self):
        conv = functools.partial(convolution, dtype=self.dtype, init=fan_out_normal)
        self.convs = [conv(self.channels, 3) for _ in range(4)]
        self.upsample = Upsample(self.channels, self.dtype)
        self.conv_logits = convolution(self.num_classes, 1, self.dtype, init=self.logits_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., 14, 14, C]` -> logits `[..., 28, 28, K]`."""
        lead = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        for conv in self.convs:
            x = nn.relu(conv(x))
        x = self.conv_logits(nn.relu(self.upsample(x)))
        return x.reshape(*lead, *x.shape[1:]).astype(at_least_float32(self.dtype))


class RoIHead(nn.Module):
    """Attributes: as those of `MaskRCNN` that are called so."""

    num_classes: int
    channels: int
    fc_channels: int
    samples: int
    positive_fraction: float
    images_per_group: int | None
    finest_side: float
    level_rule: tuple[int, float]
    truth_first: bool
    low_quality: str | None
    clamp_below: bool
    score_threshold: float
    iou_threshold: float
    most_detections: int
    kernel_init: Callable
    mask_init: Callable
    dtype: jnp.dtype

    def setup(self):
        self.bbox_head = BoxHead(self.num_classes, self.fc_channels, self.kernel_init, self.dtype)
        self.mask_head = MaskHead(self.num_classes, self.channels, self.mask_init, self.dtype)

    @nn.nowrap
    def pool(self, levels: tuple[Level, ...], boxes: jax.Array, bins: int) -> jax.Array:
        """Boxes `[B, R, 4]` from their levels: `[B, R, bins, bins, C]`."""
        shift, epsilon = self.level_rule
        of_level = level_of(boxes, len(levels), self.finest_side * levels[0].stride, shift, epsilon)
        return pyramid_roi_align(levels, boxes, of_level, bins)

    def boxes_of(self, levels: tuple[Level, ...], boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits `[B, R, K + 1]` and deltas `[B, R, K, 4]` of boxes `[B, R, 4]`."""
        return self.bbox_head(self.pool(levels, boxes, BOX_BINS))

    def masks_of(self, levels: tuple[Level, ...], boxes: jax.Array, labels: jax.Array) -> jax.Array:
        """Logits `[B, R, 28, 28]` of the masks of boxes `[B, R, 4]` as objects of classes int `[B, R]`."""
        logits = self.mask_head(self.pool(levels, boxes, MASK_BINS))
        # On a TPU a gather, whose gradient is a scatter, took a third of the mask head's time.
        of_class = labels[:, :, None, None, None] == jnp.arange(self.num_classes)
        return jnp.where(of_class, logits, 0).sum(-1)

    @nn.nowrap
    def regions(self, proposals: Proposals, targets: Targets, keys: jax.Array | None) -> Regions:
        """Assigns and samples proposals, with the ground truth among them.

        Args:
          keys: `[B]`; None: the lowest indices are chosen.
        """
        rule = functools.partial(assign, positive=0.5, negative=0.5, low_quality=self.low_quality, least=0.5)
        most_positive = int(self.samples * self.positive_fraction)

        def of_image(boxes, valid, truth, labels, there, key):
            if self.truth_first:  # a box of the ground truth is its own, whatever else it overlaps
                label, match = rule(box.overlaps(truth, boxes), there, valid)
                boxes = jnp.concatenate([truth, boxes])
                label = jnp.concatenate([jnp.where(there, 1, -1), label])
                match = jnp.concatenate([jnp.arange(len(truth), dtype=match.dtype), match])
            else:
                boxes = jnp.concatenate([boxes, truth])
                label, match = rule(box.overlaps(truth, boxes), there, jnp.concatenate([valid, there]))
            index, positive, chosen = sample(label, self.samples, most_positive, key)
            # Slots without a region: a box without area, of which everything is 0.
            boxes, match = jnp.where(chosen[:, None], boxes[index], 0), match[index]
            classes = jnp.where(positive, labels[match], self.num_classes)
            return Regions(boxes, classes, match, positive, chosen, index)

        return map_rows(of_image, proposals.boxes, proposals.valid, targets.boxes, targets.labels, targets.valid, keys)

    def losses(self, levels: tuple[Level, ...], regions: Regions, targets: Targets, width: int) -> dict[str, jax.Array]:
        """Cross-entropy of classes, L1 loss of positives' deltas, binary cross-entropy of their masks: `[]` each.

        `width` is that of the canvas.
        """
        logits, deltas = self.boxes_of(levels, regions.boxes)
        positive = regions.positive
        of_class = jnp.where(regions.valid, losses.cross_entropy(logits, regions.labels), 0).sum(axis=1)

        labels = jnp.where(positive, regions.labels, 0)
        deltas = jnp.take_along_axis(deltas, labels[:, :, None, None], axis=2)[:, :, 0]
        truth = jnp.take_along_axis(targets.boxes, regions.match[..., None], axis=1)
        wanted = jnp.where(positive[..., None], box.encode(regions.boxes, truth, STDS), 0)
        of_box = jnp.where(positive[..., None], jnp.abs(deltas - wanted), 0).sum((1, 2))

        samples = regions.valid.sum(axis=1)
        found = {"loss_cls": (of_class, samples), "loss_bbox": (of_box, samples)}
        if targets.masks is not None:
            found["loss_mask"] = self._mask_loss(levels, regions, targets, width)
        return {key: losses.per_group(*of, self.images_per_group) for key, of in found.items()}

    def _mask_loss(self, levels, regions: Regions, targets: Targets, width: int) -> tuple[jax.Array, jax.Array]:
        """Sums over each image's positives, and the number of their pixels: `[B]`."""
        most = int(self.samples * self.positive_fraction)  # positives stand first
        boxes, labels, match, positive = (
            x[:, :most] for x in (regions.boxes, regions.labels, regions.match, regions.positive)
        )
        logits = self.masks_of(levels, boxes, jnp.where(positive, labels, 0))
        masks = jnp.packbits(targets.masks, axis=-1) if targets.masks.dtype == bool else targets.masks
        wanted = jax.vmap(functools.partial(mask_targets, side=logits.shape[-1], width=width))(masks, boxes, match)
        of_mask = jnp.where(positive[..., None, None], losses.binary_cross_entropy(logits, wanted), 0)
        return of_mask.sum((1, 2, 3)), positive.sum(axis=1) * logits.shape[-1] ** 2

    def detect(self, levels: tuple[Level, ...], proposals: Proposals, sizes: jax.Array) -> Detections:
        """Classes above the threshold of every proposal, suppressed within a class, with their masks."""
        logits, deltas = self.boxes_of(levels, proposals.boxes)

        def of_image(boxes, valid, logits, deltas, size):
            k = self.num_classes
            scores = jax.nn.softmax(logits, axis=-1)[:, :k].ravel()
            decoded = box.decode(boxes[:, None], deltas, STDS, self.clamp_below).reshape(-1, 4)
            there = (scores > self.score_threshold) & jnp.repeat(valid, k)
            classes = jnp.tile(jnp.arange(k), len(boxes))
            decoded = box.clip(decoded, size)
            kept = nms(decoded, scores, there, self.iou_threshold, self.most_detections, classes)
            labels = jnp.where(kept.valid, classes[kept.index], 0).astype(jnp.int32)
            return Detections(kept.boxes, kept.scores, labels, kept.valid)

        found = map_rows(of_image, proposals.boxes, proposals.valid, logits, deltas, sizes)
        masks = jax.nn.sigmoid(self.masks_of(levels, found.boxes, found.labels))
        return found.replace(masks=jnp.where(found.valid[..., None, None], masks, 0))
