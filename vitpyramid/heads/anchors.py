"""Anchors: boxes of fixed sizes and shapes around the corner `(j * stride, i * stride)` of every cell `(i, j)`.

Boxes are equal in mmdetection and in detectron2; their order in a cell, and so that of the heads' channels, is not.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


def grid_anchors(base: np.ndarray, grid: tuple[int, int], stride: int, dtype=jnp.float32) -> jax.Array:
    """`[h * w * A, 4]`: row-major over `grid = (h, w)`, then in the order of `base [A, 4]`."""
    cell, kind = jnp.divmod(jnp.arange(grid[0] * grid[1] * len(base)), len(base))
    y, x = (stride * of.astype(dtype) for of in jnp.divmod(cell, grid[1]))
    # Side by side, each of one long axis: a TPU pads an axis of 4 to 128.
    return jnp.stack([of + jnp.asarray(base[:, i], dtype)[kind] for i, of in enumerate((x, y, x, y))], axis=-1)


def inside(grid: tuple[int, int], stride: int, sizes: jax.Array, per_cell: int) -> jax.Array:
    """Which anchors belong to cells that begin in the image as padded by itself, not in the rest of the canvas.

    Args:
      sizes: `[B, 2]`, height and width of the images; they are padded to multiples of `DIVISOR`.
      per_cell: A.

    Returns:
      bool `[B, h * w * A]` (mmdetection's `valid_flags`).
    """
    padded = -(-jnp.asarray(sizes, jnp.int32) // DIVISOR) * DIVISOR
    cells = -(-padded // stride)  # [B, 2]
    rows, columns = (jnp.arange(side) < cells[:, axis, None] for axis, side in enumerate(grid))
    return jnp.repeat((rows[:, :, None] & columns[:, None, :]).reshape(len(padded), -1), per_cell, axis=1)
