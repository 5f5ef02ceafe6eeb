"""Detection as the prediction of a set: each box of the ground truth is learned by one query, all others by none.

Carion et al., "End-to-End Object Detection with Transformers" (DETR), ECCV 2020, section 3.1; with focal losses Zhu et
al., "Deformable DETR", ICLR 2021. Equal to the originals' `matcher.py`, `SetCriterion` and `PostProcess`, and to
mmdetection's `HungarianAssigner` and `DETRHead`, whose losses are the same.

Queries are given as logits `[L, B, Q, C]` and boxes `[L, B, Q, 4]` of L layers of a decoder, at least float32. Boxes
are centre x, centre y, width, height in 0 .. 1 of the image, not of the canvas. With softmax the last of the C classes
is "no object"; with `focal` every class is a sigmoid of its own and there is none.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitpyramid.heads import boxes as box
from vitpyramid.heads import losses
from vitpyramid.heads.detector import Detections, Targets
from vitpyramid.models.sharding import map_rows

# Of the cross entropy of queries without a box (section 3.1).
NO_OBJECT = 0.1
# An empty slot takes as long as a box that is easily matched. So the search is over the first of these numbers of slots
# that is enough for every image of the batch, or over all; most of COCO's images have fewer than 16 boxes of 100.
_LENGTHS = (16, 32, 64)


class Weights(NamedTuple):
    """Of the parts of the cost of a match, and of the same parts of the loss."""

    cls: float
    bbox: float
    giou: float


DETR = Weights(1.0, 5.0, 2.0)


def match(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """The assignment of boxes to queries that costs least, solved on the device.

    Where it is unique it is `scipy.optimize.linear_sum_assignment`'s, as far as the dtype tells costs apart. A device
    solves those of its own images; all of them together take as long as the one with most steps.

    Args:
      cost: `[..., B, Q, G]`, of each query with each box. NaN and infinite costs are as bad as any can be.
      valid: bool `[B, G]`; what a slot that is not costs does not matter.

    Returns:
      int32 `[..., B, G]`: the query of each box; Q where there is none: in slots that are not valid and, in images with
      more boxes than queries, of those that are left over.
    """
    slots = valid.shape[-1]
    lengths = [*(n for n in _LENGTHS if n < slots), slots]
    rows = jnp.moveaxis(cost, -3, 0)
    solvers = [functools.partial(map_rows, functools.partial(_match, most=n)) for n in lengths]
    enough = sum(valid.sum(-1).max() > n for n in lengths[:-1])
    return jnp.moveaxis(jax.lax.switch(enough, solvers, rows, valid) if lengths[1:] else solvers[0](rows, valid), 0, -2)


def _match(cost: jax.Array, valid: jax.Array, most: int) -> jax.Array:
    """Of an image with at most so many boxes: `[..., Q, G]` and `[G]` -> `[..., G]`."""
    # Here: whoever only makes networks needs no optimizers.
    from optax.assignment import hungarian_algorithm

    *layers, q, g = cost.shape
    slots = jnp.argsort(~valid, stable=True)[:most]
    cost, valid = cost[..., slots].reshape(-1, q, most).swapaxes(1, 2), valid[slots, None]
    known = jnp.isfinite(cost) & valid
    # Dearer than any difference that one box left out can make to the others.
    high = 1 + 2 * most * jnp.where(known, jnp.abs(cost), 0).max(axis=(1, 2), keepdims=True)
    # Slots without a box have a column each where they cost nothing and are done in one step. Constant costs, which
    # give the same assignment, are ties with every query, and make the search a hundred times as long.
    spare = jnp.where(jnp.eye(most, dtype=bool) & ~valid, 0, high)
    whole = jnp.concatenate([jnp.where(known, cost, high), spare], axis=2)

    def solve(costs):
        row, query = hungarian_algorithm(costs)
        return jnp.full(g, q, jnp.int32).at[slots[row]].set(jnp.minimum(query, q).astype(jnp.int32))

    return jax.vmap(solve)(whole).reshape(*layers, g)


def normalised(targets: Targets, sizes: jax.Array) -> jax.Array:
    """The boxes of the ground truth as queries give theirs, `[B, G, 4]`; zeros in empty slots."""
    boxes = jnp.where(targets.valid[..., None], targets.boxes, 0)
    return box.to_centres(boxes) / _pixels(sizes, boxes.dtype)


def costs(
    logits: jax.Array, boxes: jax.Array, targets: Targets, sizes: jax.Array, *, focal: bool, weights: Weights
) -> jax.Array:
    """What it costs to match each query with each box, `[..., B, Q, G]`; arguments as of `set_losses`."""
    # A box that is not there can hold any label and NaN.
    labels = jnp.where(targets.valid, targets.labels, 0)
    of_class = _focal_cost(logits) if focal else -jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    of_class = jnp.einsum("...bqc,bgc->...bqg", of_class, chosen, precision="highest")
    truth = normalised(targets, sizes).astype(boxes.dtype)
    distance = jnp.abs(boxes[..., :, None, :] - truth[..., None, :, :]).sum(-1)
    overlap = box.overlaps(in_pixels(boxes, sizes), in_pixels(truth, sizes), "giou")
    return weights.cls * of_class + weights.bbox * distance - weights.giou * overlap


def _focal_cost(logits: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss of each class as the query's, less that as another's; with the original's 1e-8 in the logarithms."""
    p = jax.nn.sigmoid(logits)
    as_other = (1 - alpha) * p**gamma * -jnp.log(1 - p + 1e-8)
    return alpha * (1 - p) ** gamma * -jnp.log(p + 1e-8) - as_other


def assign(
    logits: jax.Array, boxes: jax.Array, targets: Targets, sizes: jax.Array, *, focal: bool, weights: Weights
) -> jax.Array:
    """The query of each box, int32 `[..., B, G]` as of `match`; arguments as of `set_losses`."""
    logits, boxes = jax.lax.stop_gradient((logits, boxes))
    return match(costs(logits, boxes, targets, sizes, focal=focal, weights=weights), targets.valid)


def set_losses(
    logits: jax.Array,
    boxes: jax.Array,
    targets: Targets,
    sizes: jax.Array,
    *,
    focal: bool = False,
    weights: Weights = DETR,
) -> dict[str, jax.Array]:
    """Losses of queries, each layer matched by itself: of classes, L1 of boxes, and 1 - GIoU, with their weights.

    The last two, and the focal loss, are sums over the boxes of the whole batch, over their number or 1; the cross
    entropy is the weighted mean over queries.

    Args:
      logits, boxes: `[L, B, Q, C]` and `[L, B, Q, 4]`.
      targets: boxes in pixels of the canvas, as all targets are.
      sizes: `[B, 2]`, height and width of the images in the canvas.
      focal: as above.

    Returns:
      `loss_cls`, `loss_bbox`, `loss_giou`, `[L]` each; the loss is the sum of all.
    """
    query = assign(logits, boxes, targets, sizes, focal=focal, weights=weights)
    q, classes = logits.shape[-2:]
    # Looked at from the queries: which box is theirs. A gather of queries would be a scatter in the backward pass.
    mine = query[..., None, :] == jnp.arange(q)[:, None]  # [L, B, Q, G]
    matched, slot = mine.any(-1), mine.argmax(-1)
    label = jnp.take_along_axis(targets.labels[None], slot, axis=-1)
    truth = jnp.take_along_axis(normalised(targets, sizes).astype(boxes.dtype)[None], slot[..., None], axis=-2)
    number = jnp.maximum(targets.valid.sum(), 1).astype(boxes.dtype)

    if focal:
        wanted = jax.nn.one_hot(jnp.where(matched, label, -1), classes, dtype=logits.dtype)
        of_class = losses.focal(logits, wanted).sum((1, 2, 3)) / number
    else:
        weight = jnp.where(matched, 1.0, NO_OBJECT).astype(logits.dtype)
        of_query = losses.cross_entropy(logits, jnp.where(matched, label, classes - 1))
        of_class = (weight * of_query).sum((1, 2)) / jnp.maximum(weight.sum((1, 2)), 1)
    distance = jnp.abs(boxes - truth).sum(-1)
    pairs = (in_pixels(of, sizes)[..., None, :] for of in (boxes, truth))
    overlap = box.overlaps(*pairs, "giou")[..., 0, 0]
    return {
        "loss_cls": weights.cls * of_class,
        "loss_bbox": weights.bbox * jnp.where(matched, distance, 0).sum((1, 2)) / number,
        "loss_giou": weights.giou * jnp.where(matched, 1 - overlap, 0).sum((1, 2)) / number,
    }


def detections(
    logits: jax.Array, boxes: jax.Array, sizes: jax.Array, *, focal: bool = False, most: int = 100, clip: bool = True
) -> Detections:
    """What the queries of a layer, `[B, Q, C]` and `[B, Q, 4]`, have found; there is no suppression.

    Args:
      sizes: as of `set_losses`.
      focal: any class of a query can be detected; otherwise only its best one, "no object" left out.
      most: the best `most` are returned, or all if there are fewer.
      clip: boxes are cut at the image's border (mmdetection, not the originals).
    """

    def of_image(logits, boxes):
        q, classes = logits.shape
        if focal:
            scores, pair = jax.lax.top_k(jax.nn.sigmoid(logits).ravel(), min(most, q * classes))
            return scores, pair % classes, boxes[pair // classes]
        found = jax.nn.softmax(logits)[:, :-1]
        scores, query = jax.lax.top_k(found.max(-1), min(most, q))
        return scores, found.argmax(-1)[query], boxes[query]

    scores, labels, chosen = map_rows(of_image, logits, boxes)
    chosen = in_pixels(chosen, sizes)
    if clip:
        chosen = box.clip(chosen, sizes)
    return Detections(chosen, scores, labels.astype(jnp.int32), jnp.ones(scores.shape, bool))


def in_pixels(boxes: jax.Array, sizes: jax.Array) -> jax.Array:
    """`[..., B, N, 4]`, centres and sides in 0 .. 1 of images of these sizes -> x1 y1 x2 y2 in pixels of the canvas."""
    return box.from_centres(boxes * _pixels(sizes, boxes.dtype))


def _pixels(sizes: jax.Array, dtype) -> jax.Array:
    """`[B, 1, 4]`: width, height, width, height of each image."""
    return jnp.tile(jnp.asarray(sizes, dtype)[:, None, ::-1], 2)
