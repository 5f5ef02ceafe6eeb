"""Greedy non-maximum suppression with static shapes, exact for any number of candidates.

Blocks of candidates are taken in order of their scores until enough are kept: what a block's boxes overlap in what was
kept before goes at once, what they overlap in one another is found by iterating to the fixed point. A network's
thousands of candidates so cost, as a rule, one or two small sorts and matrices of overlaps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vitpyramid.heads import boxes as box
from vitpyramid.heads.selection import top_k


class Kept(NamedTuple):
    """Of `n` slots, in order of falling scores; slots that are not `valid` hold zeros.

    Attributes:
      boxes: `[n, 4]`.
      scores: `[n]`.
      index: int32 `[n]`, among the candidates.
      valid: bool `[n]`.
    """

    boxes: jax.Array
    scores: jax.Array
    index: jax.Array
    valid: jax.Array


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    threshold: float,
    most: int,
    groups: jax.Array | None = None,
    block: int = 512,
) -> Kept:
    """Keeps the best-scored boxes that overlap no better one of their group by more than `threshold`.

    A box that overlaps by `threshold` itself stays, as in the CUDA kernels of mmcv and torchvision. Of equal scores
    the lower index comes first.

    Args:
      boxes: `[N, 4]`.
      scores: `[N]`.
      valid: bool `[N]`, which candidates there are.
      most: boxes kept at most.
      groups: int `[N]`, classes or levels: boxes of different ones do not suppress each other; None: one group.
      block: candidates looked at together.
    """
    n = boxes.shape[0]
    if n == 0:
        empty = jnp.zeros(most, jnp.int32)
        return Kept(jnp.zeros((most, 4), boxes.dtype), empty.astype(scores.dtype), empty, empty > 0)
    block = min(block, n)
    if groups is None:
        groups = jnp.zeros(n, jnp.int32)
    candidates = valid.sum()

    def suppresses(of, others):
        (of_boxes, of_groups), (other_boxes, other_groups) = of, others
        overlap = box.overlaps(of_boxes, other_boxes) > threshold
        return overlap & (of_groups[:, None] == other_groups)

    def one_block(state):
        begin, left, kept, count = state
        _, index = top_k(jnp.where(left, scores, -jnp.inf), block)
        mine = boxes[index], groups[index]
        there = left[index]
        before = jnp.arange(most) < count
        there &= ~(suppresses((boxes[kept], groups[kept]), mine) & before[:, None]).any(axis=0)
        # Entry (i, j): i comes first and would take j with it.
        earlier = suppresses(mine, mine) & jnp.triu(jnp.ones((block, block), bool), k=1)

        def settle(stays):
            return there & ~(earlier & stays[:, None]).any(axis=0)

        stays, _ = jax.lax.while_loop(
            lambda pair: (pair[0] != pair[1]).any(), lambda pair: (settle(pair[0]), pair[0]), (settle(there), there)
        )
        slot = jnp.where(stays, count + jnp.cumsum(stays) - 1, most)
        kept = kept.at[slot].set(index, mode="drop")
        return begin + block, left.at[index].set(False), kept, jnp.minimum(count + stays.sum(), most)

    start = jnp.zeros((), jnp.int32), valid, jnp.zeros(most, jnp.int32), jnp.zeros((), candidates.dtype)
    _, _, kept, count = jax.lax.while_loop(lambda state: (state[0] < candidates) & (state[3] < most), one_block, start)
    filled = jnp.arange(most) < count
    chosen = jnp.where(filled[:, None], boxes[kept], 0)
    return Kept(chosen, jnp.where(filled, scores[kept], 0), kept, filled)
