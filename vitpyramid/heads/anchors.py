"""Anchors: boxes of fixed sizes and shapes around the corner `(j * stride, i * stride)` of every cell `(i, j)`.

Boxes are equal in mmdetection and in detectron2; their order in a cell, and so that of the heads' channels, is not.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.backbone import Level

RATIOS = (0.5, 1.0, 2.0)  # height over width
# Images are padded to multiples of this before they are padded to the batch's canvas.
DIVISOR = 32


def base_anchors(sizes: Sequence[float], ratios: Sequence[float] = RATIOS, order: str = "ratio") -> np.ndarray:
    """Anchors of the cell at the origin, float64 `[A, 4]`, A = `len(sizes) * len(ratios)`.

    Args:
      sizes: square roots of their areas, in pixels.
      ratios: height over width.
      order: which changes last: "ratio" (mmdetection: all sizes of the first ratio, ...) or "size" (detectron2).
    """
    pairs = itertools.product(ratios, sizes) if order == "ratio" else ((r, s) for s in sizes for r in ratios)
    halves = [(size / ratio**0.5 / 2, size * ratio**0.5 / 2) for ratio, size in pairs]
    return np.array([(-w, -h, w, h) for w, h in halves])


def grid_anchors(base: np.ndarray, grid: tuple[int, int], stride: int, dtype=np.float32) -> np.ndarray:
    """`[h * w * A, 4]`: row-major over `grid = (h, w)`, then in the order of `base [A, 4]`."""
    y, x = np.indices(grid, dtype)[:, :, :, None] * stride
    return (np.stack([x, y, x, y], axis=-1) + base.astype(dtype)).reshape(-1, 4)


def pyramid_anchors(
    levels: Sequence[Level], scales: Sequence[float], order: str = "ratio", dtype=np.float32
) -> tuple[np.ndarray, ...]:
    """`grid_anchors` of every level; their sizes are `scales` times its stride.

    Constants of a program: a TPU's compiler takes minutes for places that are counted and flattened in it.
    """
    bases = (base_anchors([scale * level.stride for scale in scales], order=order) for level in levels)
    grids = ((level.x.shape[1:3], level.stride, dtype) for level in levels)
    return tuple(grid_anchors(base, *grid) for base, grid in zip(bases, grids, strict=True))


def inside_pyramid(levels: Sequence[Level], sizes: jax.Array, per_cell: int) -> jax.Array:
    """Which anchors belong to cells that begin in the image as padded by itself, not in the rest of the canvas.

    Args:
      sizes: `[B, 2]`, height and width of the images; they are padded to multiples of `DIVISOR`.
      per_cell: A.

    Returns:
      bool `[B, N]`, of all levels (mmdetection's `valid_flags`).
    """
    begins = [level.stride * np.indices(level.x.shape[1:3], np.int32).reshape(2, -1) for level in levels]
    y, x = np.repeat(np.concatenate(begins, axis=1), per_cell, axis=1)
    padded = -(-jnp.asarray(sizes, jnp.int32) // DIVISOR) * DIVISOR
    return (y < padded[:, :1]) & (x < padded[:, 1:])
