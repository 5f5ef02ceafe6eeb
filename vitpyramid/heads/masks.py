"""Masks of boxes: what they are to learn, and predicted ones on the image."""

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.heads.roi_align import bin_weights


def mask_targets(masks: jax.Array, boxes: jax.Array, match: jax.Array, side: int, width: int) -> jax.Array:
    """What of their object's mask is in boxes, resampled by RoIAlign and cut at a half.

    Equal to `BitmapMasks.crop_and_resize` (mmdetection) and `BitMasks.crop_and_resize` (detectron2).

    Args:
      masks: uint8 `[G, H, ceil(W / 8)]`, of objects on the canvas, as of `Targets`.
      boxes: `[R, 4]`.
      match: int `[R]`, the object of each box.
      side: of the result.
      width: of the canvas, W.

    Returns:
      bool `[R, side, side]`.
    """
    rows = bin_weights(boxes[:, 1], boxes[:, 3], side, masks.shape[1])
    columns = bin_weights(boxes[:, 0], boxes[:, 2], side, width)
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, -width % 8))).reshape(*columns.shape[:2], -1, 8)
    shifts = np.arange(7, -1, -1, dtype=np.uint8)[:, None, None]

    def of_box(parts):
        rows, columns, index = parts
        # Each bit of all bytes by itself: on a TPU, to lay the bits of a byte side by side took longer than the step.
        bits = (masks[index] >> shifts & 1).astype(rows.dtype)
        of_rows = jnp.einsum("sh,khb->skb", rows, bits, precision="highest")
        return jnp.einsum("skb,tbk->st", of_rows, columns, precision="highest")

    # One after another: canvases of all boxes at a time would be the largest arrays of a step.
    return jax.lax.map(of_box, (rows, columns, match)) >= 0.5


def paste(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float | None = 0.5) -> np.ndarray:
    """Masks of boxes on an image, on the host (`fcn_mask_head.py` of mmdetection, `mask_ops.py` of detectron2).

    A pixel gets the bilinear value at its centre, 0 beyond the mask's outermost cells.

    Args:
      masks: `[n, S, S]`, probabilities.
      boxes: `[n, 4]`, in pixels of the image.
      size: height and width of the image.
      threshold: pixels of at least this belong to the object; None: probabilities are returned.

    Returns:
      `[n, height, width]`: bool, or the masks' type. Boxes without area have nothing.
    """
    masks, boxes = np.asarray(masks), np.asarray(boxes)
    out = np.zeros((len(masks), *size), masks.dtype if threshold is None else bool)
    for mask, (x1, y1, x2, y2), canvas in zip(masks, boxes, out, strict=True):
        if x2 <= x1 or y2 <= y1:
            continue
        rows, first_row = _cells(y1, y2, mask.shape[0], size[0])
        columns, first_column = _cells(x1, x2, mask.shape[1], size[1])
        values = rows @ mask @ columns.T
        region = canvas[first_row : first_row + len(rows), first_column : first_column + len(columns)]
        region[:] = values if threshold is None else values >= threshold
    return out


def _cells(low: float, high: float, cells: int, size: int) -> tuple[np.ndarray, int]:
    """Weights `[pixels, cells]` of those pixels that a box reaches, and the first of them."""
    margin = (high - low) / cells / 2
    first = int(np.clip(np.floor(low - margin), 0, size))
    last = int(np.clip(np.ceil(high + margin), first, size))
    places = (np.arange(first, last) + 0.5 - low) / (high - low) * cells - 0.5
    return np.maximum(1 - np.abs(places[:, None] - np.arange(cells)), 0), first
