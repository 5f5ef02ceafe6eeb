"""Region proposal network on a pyramid: Ren et al., "Faster R-CNN", NeurIPS 2015, section 3; Lin et al., "Feature
Pyramid Networks", section 4.1."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.heads import anchors, losses
from vitpyramid.heads import boxes as box
from vitpyramid.heads.detector import Targets
from vitpyramid.heads.layers import convolution, one_per_anchor, per_anchor
from vitpyramid.heads.matching import Sample, assign, sample
from vitpyramid.heads.nms import nms
from vitpyramid.heads.selection import top_k
from vitpyramid.models.backbone import Level
from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.sharding import map_rows

RATIOS = anchors.RATIOS
SCALE = 8.0  # side of a level's square anchor, in strides


@flax.struct.dataclass
class Objectness:
    """Of every anchor, level by level, `[B, n]` and `[B, n, 4]` a level."""

    logits: tuple[jax.Array, ...]
    deltas: tuple[jax.Array, ...]


@flax.struct.dataclass
class Proposals:
    """Of a batch, in order of falling scores; slots that are not `valid` hold zeros.

    Attributes:
      boxes: `[B, P, 4]`, pixels of the canvas, inside the image.
      scores: `[B, P]`, logits (mmdetection's are their sigmoid).
      valid: bool `[B, P]`.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


class RPN(nn.Module):
    """Objectness and deltas of three anchors a cell, proposals of them, and their losses.

    Attributes: as those of `MaskRCNN` that are called so, without `rpn_`.
    """

    channels: int
    samples: int
    iou_threshold: float
    images_per_group: int | None
    low_quality: str
    least: float
    learns_padding: bool
    clamp_below: bool
    normaliser: str
    dtype: jnp.dtype

    def setup(self):
        self.rpn_conv = convolution(self.channels, 3, self.dtype)
        self.rpn_cls = convolution(len(RATIOS), 1, self.dtype)
        self.rpn_reg = convolution(len(RATIOS) * 4, 1, self.dtype)

    def __call__(self, levels: tuple[Level, ...]) -> Objectness:
        """Of maps `[B, h, w, C]`."""
        dtype = at_least_float32(self.dtype)
        logits, deltas = [], []
        for level in levels:
            x = nn.relu(self.rpn_conv(level.x))
            logits.append(one_per_anchor(self.rpn_cls(x)).astype(dtype))
            deltas.append(per_anchor(self.rpn_reg(x), 4).astype(dtype))
        return Objectness(tuple(logits), tuple(deltas))

    @nn.nowrap
    def anchors(self, levels: tuple[Level, ...]) -> tuple[np.ndarray, ...]:
        """`[h * w * 3, 4]` of every level."""
        return anchors.pyramid_anchors(levels, (SCALE,), dtype=at_least_float32(self.dtype))

    @nn.nowrap
    def propose(
        self, objectness: Objectness, levels: tuple[Level, ...], sizes: jax.Array, before: int, after: int
    ) -> Proposals:
        """The best boxes that no better one of their level covers.

        Args:
          sizes: `[B, 2]`, height and width of the images.
          before, after: boxes of a level before suppression, and of all levels after it.
        """

        def of_image(logits, deltas, size):
            boxes, scores, level = [], [], []
            for i, (of_anchors, logit, delta) in enumerate(zip(self.anchors(levels), logits, deltas, strict=True)):
                score, index = top_k(logit, min(before, len(logit)))
                decoded = box.decode(jnp.asarray(of_anchors)[index], delta[index], clamp_below=self.clamp_below)
                boxes.append(box.clip(decoded, size))
                scores.append(score)
                level.append(jnp.full(len(score), i))
            boxes, scores, level = map(jnp.concatenate, (boxes, scores, level))
            there = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            kept = nms(boxes, scores, there, self.iou_threshold, after, level)
            return Proposals(kept.boxes, kept.scores, kept.valid)

        objectness = jax.lax.stop_gradient(objectness)
        return map_rows(of_image, objectness.logits, objectness.deltas, sizes)

    @nn.nowrap
    def samples_of(
        self, levels: tuple[Level, ...], targets: Targets, sizes: jax.Array, keys: jax.Array | None
    ) -> tuple[Sample, jax.Array]:
        """The anchors that are learned from, `[B, samples]`, and the box each was assigned to, int32 `[B, N]`.

        Args:
          keys: `[B]`; None: the lowest indices are chosen.
        """
        rule = functools.partial(assign, positive=0.7, negative=0.3, low_quality=self.low_quality, least=self.least)

        def of_image(boxes, valid, learned, key):
            label, match = rule(box.overlaps(boxes, np.concatenate(self.anchors(levels))), valid, learned)
            return sample(label, self.samples, self.samples // 2, key), match

        learned = anchors.inside_pyramid(levels, sizes, len(RATIOS)) | self.learns_padding
        return map_rows(of_image, targets.boxes, targets.valid, learned, keys)

    @nn.nowrap
    def losses(
        self,
        objectness: Objectness,
        levels: tuple[Level, ...],
        targets: Targets,
        sizes: jax.Array,
        keys: jax.Array | None,
    ) -> dict[str, jax.Array]:
        """Cross-entropy of object or not, and L1 loss of positives' deltas; `[levels]` each."""
        (index, positive, valid), match = self.samples_of(levels, targets, sizes, keys)
        of_levels = self.anchors(levels)
        chosen = jnp.asarray(np.concatenate(of_levels))[index]  # [B, n, 4]
        lengths = [len(of_level) for of_level in of_levels]
        level = (index[..., None] >= np.cumsum(lengths)).sum(-1)

        logits = jnp.take_along_axis(jnp.concatenate(objectness.logits, axis=1), index, axis=1)
        of_class = jnp.where(valid, losses.binary_cross_entropy(logits, positive), 0)

        deltas = jnp.concatenate(objectness.deltas, axis=1)
        deltas = jnp.take_along_axis(deltas, index[..., None], axis=1)
        box_of = jnp.take_along_axis(match, index, axis=1)[..., None]
        wanted = box.encode(chosen, jnp.take_along_axis(targets.boxes, box_of, axis=1))
        wanted = jnp.where(positive[..., None], wanted, 0)
        of_box = jnp.where(positive[..., None], jnp.abs(deltas - wanted), 0).sum(-1)

        level = jax.nn.one_hot(level, len(lengths), dtype=logits.dtype)
        if self.normaliser == "samples":
            positives, all_samples = positive.sum(axis=1), valid.sum(axis=1)
            divisors = jnp.maximum(positives, 1) + jnp.maximum(all_samples - positives, 1)
        else:
            divisors = jnp.full(len(index), self.samples)
        return {
            key: losses.per_group(jnp.einsum("bn,bnl->bl", value, level), divisors, self.images_per_group)
            for key, value in (("loss_rpn_cls", of_class), ("loss_rpn_bbox", of_box))
        }
