"""Which box of the ground truth each anchor or proposal learns, and which of them are learned from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitpyramid.heads.selection import largest, places


class Assignment(NamedTuple):
    """Of N anchors or proposals.

    Attributes:
      label: int32 `[N]`: 1 a positive, 0 background, -1 not learned from.
      match: int32 `[N]`: the box of the ground truth, of positives; otherwise of no meaning.
    """

    label: jax.Array
    match: jax.Array


class Sample(NamedTuple):
    """Chosen anchors or proposals: first positives, then background, in order of their indices.

    Attributes:
      index: int32 `[n]`; 0 where a slot is empty.
      positive: bool `[n]`.
      valid: bool `[n]`: the slot holds something.
    """

    index: jax.Array
    positive: jax.Array
    valid: jax.Array


def assign(
    overlaps: jax.Array,
    boxes_valid: jax.Array,
    anchors_valid: jax.Array | bool = True,
    *,
    positive: float,
    negative: float,
    low_quality: str | None,
    least: float = 0.0,
) -> Assignment:
    """Assigns by largest overlap (mmdetection's `MaxIoUAssigner`, detectron2's `Matcher`).

    Args:
      overlaps: `[G, N]`, of each box of the ground truth with each anchor.
      boxes_valid: bool `[G]`, which boxes there are.
      anchors_valid: bool `[N]`; others get label -1 and are nobody's best.
      positive, negative: an anchor whose largest overlap is at least `positive` is one, below `negative` background.
      low_quality: what the anchors that a box overlaps most are to it, all of them where several overlap equally:
        "match": they are assigned to it, to the last such box (mmdetection); "label": they are positives of the box
        that overlaps them most (detectron2); None: nothing.
      least: with `low_quality`: of the box's largest overlap. At 0 a box that no anchor overlaps takes every anchor
        that it does not overlap, as in both libraries.
    """
    g = overlaps.shape[0]
    anchors_valid = jnp.broadcast_to(anchors_valid, overlaps.shape[1:])
    if g == 0:
        return Assignment(jnp.where(anchors_valid, 0, -1), jnp.zeros(anchors_valid.shape, jnp.int32))
    overlaps = jnp.where(boxes_valid[:, None] & anchors_valid, overlaps, -1.0)
    match = overlaps.argmax(axis=0).astype(jnp.int32)  # the first of equals
    largest = jnp.maximum(overlaps.max(axis=0), 0.0)  # without any box everything is background
    label = jnp.where(largest >= positive, 1, jnp.where(largest < negative, 0, -1))
    if low_quality:
        best = overlaps.max(axis=1, keepdims=True)
        takes = boxes_valid[:, None] & anchors_valid & (best >= least) & (overlaps == best)
        last = jnp.where(takes, jnp.arange(g, dtype=jnp.int32)[:, None], -1).max(axis=0)
        label = jnp.where(last >= 0, 1, label)
        if low_quality == "match":
            match = jnp.where(last >= 0, last, match)
    return Assignment(jnp.where(anchors_valid, label, -1), match)


def sample(label: jax.Array, n: int, most_positive: int, key: jax.Array | None) -> Sample:
    """Chooses `n` of those with a label: at most `most_positive` positives, the rest background as far as there is.

    Args:
      label: `[N]`, as in `Assignment`.
      key: of the random choice; None: the lowest indices are chosen.
    """
    total = label.shape[0]
    order = -jnp.arange(total, dtype=jnp.float32) if key is None else jax.random.uniform(key, (total,))

    def choose(candidates: jax.Array, number: jax.Array | int) -> jax.Array:
        return candidates & largest(jnp.where(candidates, order, -jnp.inf), number)

    positives = choose(label == 1, most_positive)
    first = positives.sum()
    background = choose(label == 0, n - first)
    slot = jnp.arange(n)
    positive, valid = slot < first, slot < first + background.sum()
    index = jnp.where(positive, places(positives, slot), places(background, slot - first))
    return Sample(jnp.where(valid, index, 0), positive, valid)
