"""What detectors share: the ground truth that they learn from and the detections that they return."""

import flax
import jax
import jax.numpy as jnp

from vitpyramid.heads import boxes as box


@flax.struct.dataclass
class Targets:
    """Ground truth of a batch, padded to G boxes an image.

    Attributes:
      boxes: `[B, G, 4]`, x1 y1 x2 y2 in pixels of the canvas.
      labels: int32 `[B, G]`, classes from 0.
      valid: bool `[B, G]`: which slots hold a box; what the others hold is of no effect.
      masks: of those who learn masks, bool `[B, G, H, W]` on the canvas, or uint8 `[B, G, H, ceil(W / 8)]`: eight
        columns a byte, as `numpy.packbits` packs them.
    """

    boxes: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: jax.Array | None = None


@flax.struct.dataclass
class Detections:
    """Of a batch, n slots an image in order of falling scores; slots that are not `valid` hold zeros.

    Attributes:
      boxes: `[B, n, 4]`, x1 y1 x2 y2 in pixels of the canvas.
      scores: `[B, n]`, probabilities.
      labels: int32 `[B, n]`, classes from 0.
      valid: bool `[B, n]`.
      masks: `[B, n, S, S]`, probabilities of the pixels of each box, of those who predict masks.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array
    masks: jax.Array | None = None


def whole(images: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """`sizes`, or those of the canvas where there are none: int32 `[B, 2]`."""
    return jnp.tile(jnp.array(images.shape[1:3]), (len(images), 1)) if sizes is None else jnp.asarray(sizes)


def rescale(detections: Detections, factors: jax.Array, limits: jax.Array | None = None) -> Detections:
    """Detections in pixels of the images as they were before they were resized to the canvas.

    Args:
      factors: `[B, 2]`: pixels of the canvas in one of the image, down and across. mmdetection's are float32.
      limits: `[B, 2]`, height and width of the images: boxes are cut there, and those that become empty are no longer
        `valid` (detectron2); None: boxes stay as they are (mmdetection, which cut them before).
    """
    factors = jnp.asarray(factors, detections.boxes.dtype)
    boxes = detections.boxes / jnp.concatenate([factors[:, ::-1]] * 2, axis=-1)[:, None]
    valid = detections.valid
    if limits is not None:
        boxes = box.clip(boxes, limits)
        valid &= (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return detections.replace(boxes=boxes, valid=valid)
