"""Boxes: `[..., 4]` as x1 y1 x2 y2 in pixels of the canvas, without any + 1; deltas between boxes; overlaps.

Equal to `DeltaXYWHBBoxCoder` and `bbox_overlaps` of mmdetection 2.13 and to `Box2BoxTransform` of detectron2.
"""

import math

import jax
import jax.numpy as jnp

# Both libraries: no side is made more than 1000 / 16 times as long.
LARGEST_DELTA = math.log(1000 / 16)
# Of unions: two empty boxes overlap by 0.
EPSILON = 1e-6


def area(boxes: jax.Array) -> jax.Array:
    """`[..., 4]` -> `[...]`, square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(boxes: jax.Array, others: jax.Array, kind: str = "iou") -> jax.Array:
    """How much each of `boxes` and each of `others` have in common.

    Args:
      boxes, others: `[..., N, 4]` and `[..., M, 4]`.
      kind: "iou": intersection over union; "iof": over the area of `boxes`; "giou": the IoU less the part of the
        smallest box around both that is in neither (Rezatofighi et al., CVPR 2019).

    Returns:
      `[..., N, M]`.
    """
    boxes, others = boxes[..., :, None, :], others[..., None, :, :]

    def extent(low, high, side: int) -> jax.Array:
        """From the one's border to the other's, across or down. Sides apart: a TPU pads an axis of 2 to 128."""
        first, last = low(boxes[..., side], others[..., side]), high(boxes[..., side + 2], others[..., side + 2])
        return jnp.maximum(last - first, 0)

    common = extent(jnp.maximum, jnp.minimum, 0) * extent(jnp.maximum, jnp.minimum, 1)
    if kind == "iof":
        return common / jnp.maximum(area(boxes), EPSILON)
    union = jnp.maximum(area(boxes) + area(others) - common, EPSILON)
    if kind == "iou":
        return common / union
    around = jnp.maximum(extent(jnp.minimum, jnp.maximum, 0) * extent(jnp.minimum, jnp.maximum, 1), EPSILON)
    return common / union - (around - union) / around


def encode(boxes: jax.Array, targets: jax.Array, stds: tuple[float, ...] = (1, 1, 1, 1)) -> jax.Array:
    """Deltas that make `targets` of `boxes`: centre's shift in sides, logarithm of the ratio of sides, over `stds`.

    All `[..., 4]`. Of boxes without area the deltas are not finite.
    """
    sides, target_sides = _sides(boxes), _sides(targets)
    shift = (_centres(targets) - _centres(boxes)) / sides
    return jnp.concatenate([shift, jnp.log(target_sides / sides)], axis=-1) / jnp.asarray(stds, boxes.dtype)


def decode(
    boxes: jax.Array, deltas: jax.Array, stds: tuple[float, ...] = (1, 1, 1, 1), clamp_below: bool = True
) -> jax.Array:
    """The boxes that `deltas` make of `boxes`, `[..., 4]`; inverse of `encode`.

    Args:
      clamp_below: the logarithms of the ratios of sides are kept above `-LARGEST_DELTA` (mmdetection) and not only
        below `LARGEST_DELTA` (detectron2).
    """
    deltas = deltas * jnp.asarray(stds, deltas.dtype)
    lowest = -LARGEST_DELTA if clamp_below else None
    sides = _sides(boxes) * jnp.exp(jnp.clip(deltas[..., 2:], lowest, LARGEST_DELTA))
    centres = _centres(boxes) + deltas[..., :2] * _sides(boxes)
    return from_centres(jnp.concatenate([centres, sides], axis=-1))


def from_centres(boxes: jax.Array) -> jax.Array:
    """Centre x, centre y, width, height -> x1 y1 x2 y2, `[..., 4]`."""
    centres, sides = jnp.split(boxes, 2, axis=-1)
    return jnp.concatenate([centres - sides / 2, centres + sides / 2], axis=-1)


def to_centres(boxes: jax.Array) -> jax.Array:
    """Inverse of `from_centres`."""
    return jnp.concatenate([_centres(boxes), _sides(boxes)], axis=-1)


def clip(boxes: jax.Array, sizes: jax.Array) -> jax.Array:
    """Boxes cut at the borders of their images.

    Args:
      boxes: `[..., N, 4]`.
      sizes: `[..., 2]`, height and width.
    """
    height_width = jnp.asarray(sizes, boxes.dtype)[..., None, :]
    limits = jnp.concatenate([height_width[..., ::-1]] * 2, axis=-1)
    return jnp.clip(boxes, 0, limits)


def _sides(boxes: jax.Array) -> jax.Array:
    return boxes[..., 2:] - boxes[..., :2]


def _centres(boxes: jax.Array) -> jax.Array:
    return (boxes[..., 2:] + boxes[..., :2]) / 2
