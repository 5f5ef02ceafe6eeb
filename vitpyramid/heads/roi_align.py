"""RoIAlign (He et al., "Mask R-CNN", ICCV 2017, section 3) as two matrix products, and on a pyramid.

What a bin gets is a mean over a regular grid of points, each read bilinearly, so the sum over a map parts into one over
rows and one over columns: `out = rows @ map @ columns^T` with `rows [S, h]` and `columns [S, w]` of the region. The
products run on the matrix unit; no pixel is gathered, and no bound on the number of points is needed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vitpyramid.heads import boxes as box
from vitpyramid.models.backbone import Level

# Points of one bin that can lie within a pixel of some row: they are more than half a pixel apart where there are two.
_NEAR = 6


def bin_weights(low: jax.Array, high: jax.Array, bins: int, size: int, points: int = 0) -> jax.Array:
    """Along one axis: how much of each row of a map the bins of each region take.

    Equal to RoIAlign with `aligned=True`, as torchvision, mmcv and detectron2 have it, at any size of the regions.

    Args:
      low, high: `[R]`, borders of the regions, in rows of the map.
      bins: of a region, S.
      size: rows of the map; points further than one row outside count as 0, others are moved to the border.
      points: of a bin; 0: as many as a bin has rows, rounded up.

    Returns:
      `[R, S, size]`.
    """
    start, length = low - 0.5, high - low
    width = (length / bins)[:, None, None]
    number = jnp.ceil(width) if points == 0 else jnp.full_like(width, points)
    spacing = width / jnp.maximum(number, 1)
    begin = start[:, None, None] + jnp.arange(bins, dtype=low.dtype)[:, None] * width
    rows = jnp.arange(size, dtype=low.dtype)
    if points == 0:
        # The first point that is less than a row before this one, and those that follow.
        distance = (rows - 1 - begin) / jnp.where(spacing > 0, spacing, 1)
        first = jnp.maximum(jnp.ceil(distance - 0.5) - 1, 0)
        near = _NEAR
    else:
        first, near = jnp.zeros_like(rows), points
    total = 0.0
    for k in range(near):
        point = first + k
        place = begin + (point + 0.5) * spacing
        counts = (point < number) & (place >= -1) & (place <= size)
        weight = jnp.maximum(1 - jnp.abs(jnp.clip(place, 0, size - 1) - rows), 0)
        total += jnp.where(counts, weight, 0)
    return total / jnp.maximum(number, 1)


def roi_align(x: jax.Array, boxes: jax.Array, bins: int, stride: float = 1, points: int = 0) -> jax.Array:
    """Regions of one map, resampled to squares of `bins` x `bins`.

    Args:
      x: `[h, w, C]`.
      boxes: `[R, 4]`, in pixels.
      stride: pixels per cell of the map.
      points: of a bin in each direction; 0: as many as it has cells, rounded up; then an empty region gives 0.

    Returns:
      `[R, bins, bins, C]`, in the map's type.
    """
    boxes = boxes / stride
    rows = bin_weights(boxes[:, 1], boxes[:, 3], bins, x.shape[0], points)
    columns = bin_weights(boxes[:, 0], boxes[:, 2], bins, x.shape[1], points)
    return _resample(x, rows, columns)


def pyramid_roi_align(
    levels: Sequence[Level], boxes: jax.Array, of_level: jax.Array, bins: int, points: int = 0, chunk: int = 64
) -> jax.Array:
    """`roi_align` of every box on its own level of a pyramid.

    Args:
      levels: maps `[B, h, w, C]`.
      boxes: `[B, R, 4]`, in pixels.
      of_level: int `[B, R]`, index among `levels`.
      chunk: regions that are resampled together: what is between the two products has `[chunk, bins, w, C]`.

    Returns:
      `[B, R, bins, bins, C]`.
    """

    def of_regions(maps: list[jax.Array], boxes: jax.Array, of_level: jax.Array) -> jax.Array:
        out = 0
        for i, (x, level) in enumerate(zip(maps, levels, strict=True)):
            scaled = boxes / level.stride
            rows = bin_weights(scaled[:, 1], scaled[:, 3], bins, x.shape[0], points)
            columns = bin_weights(scaled[:, 0], scaled[:, 2], bins, x.shape[1], points)
            out += _resample(x, jnp.where((of_level == i)[:, None, None], rows, 0), columns)
        return out

    def of_image(maps: list[jax.Array], boxes: jax.Array, of_level: jax.Array) -> jax.Array:
        regions = boxes.shape[0]
        if regions <= chunk:
            return of_regions(maps, boxes, of_level)
        padding = -regions % chunk
        parts = (jnp.pad(boxes, ((0, padding), (0, 0))), jnp.pad(of_level, (0, padding)))
        parts = tuple(part.reshape(-1, chunk, *part.shape[1:]) for part in parts)
        # Recomputed in the backward pass: stored, the halves of all regions would be the largest arrays of a step.
        one = jax.checkpoint(lambda part: of_regions(maps, *part))
        out = jax.lax.map(one, parts)
        return out.reshape(-1, *out.shape[2:])[:regions]

    return jax.vmap(of_image)([level.x for level in levels], boxes, of_level)


def level_of(boxes: jax.Array, levels: int, finest: float, shift: int = 0, epsilon: float = 1e-6) -> jax.Array:
    """Which level of a pyramid a region is read from (Lin et al., "Feature Pyramid Networks", equation 1).

    Args:
      boxes: `[..., 4]`.
      levels: how many there are.
      finest: boxes of a side below twice this are read from the finest level; each further level doubles it.
      shift, epsilon: the formula is `floor(shift + log2(side / (finest * 2^shift) + epsilon))`: mmdetection has 0 and
        1e-6, detectron2 2 and 1e-8, which differ within rounding of a power of two.

    Returns:
      int32 `[...]`, 0 for the finest.
    """
    side = jnp.sqrt(jnp.maximum(box.area(boxes), 0))
    level = jnp.floor(shift + jnp.log2(side / (finest * 2**shift) + epsilon))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


@jax.named_scope("resample")  # by this name it is not counted among what layers multiply
def _resample(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`[h, w, C]` with `[R, S, h]` and `[R, S, w]` -> `[R, S, S, C]`, the longer axis first: less is left between."""
    rows, columns = rows.astype(x.dtype), columns.astype(x.dtype)
    if x.shape[0] > x.shape[1]:
        return jnp.einsum("rswc,rtw->rstc", jnp.einsum("rsh,hwc->rswc", rows, x), columns)
    return jnp.einsum("rsh,rthc->rstc", rows, jnp.einsum("rtw,hwc->rthc", columns, x))
