"""What the device does to a batch of images: normalise, mixup, CutMix and random erasing, and in which order.

Pure functions of a key, whatever devices hold the batch. The rules are timm's (`timm/data/mixup.py` and
`random_erasing.py`, 0.3.2, with which the four families were trained).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from ml_collections import ConfigDict

from vitpyramid.models.forms import at_least_float32, by_device
from vitpyramid.models.sharding import on_each_device

ERASED_AREA = (0.02, 1 / 3)  # of the image, for all boxes together
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
TRIES = 10  # for a box that fits


def prepare(
    key: jax.Array, images: jax.Array, targets: jax.Array, config: ConfigDict, mean, std, dtype
) -> tuple[jax.Array, jax.Array]:
    """The random part on the device: DeiT's order is normalise, erase, mix; T2T-ViT's mix, normalise, erase.

    Args:
      images: uint8 `[B, H, W, 3]`.
      targets: `[B, K]`, distributions.
      config: reads `mix` and `erase`; `mix.before_normalise` says which order.
      mean, std: of the channels, in `[0, 1]`.

    Returns:
      Images in `dtype`, and targets.
    """
    erase_key, mix_key = jax.random.split(key)
    if config.mix.before_normalise:
        images, targets = mix(mix_key, images, targets, config.mix)
    images = planar(erase(erase_key, normalise(images, mean, std, dtype), config.erase))
    if not config.mix.before_normalise:
        # Without the barrier the compiler draws the noise of erasing twice: for an image, and for its partner.
        images, targets = mix(mix_key, jax.lax.optimization_barrier(images), targets, config.mix)
        images = planar(images)
    return images, targets


def planar(images: jax.Array) -> jax.Array:
    """The same images, which a TPU shall lay out with a plane of rows and columns for each channel, as they arrive.

    By itself it takes the layout that the network's first layer reads, whose lanes are the batch or the channels: few
    of them are used, and the noise of erasing costs as much as if all were.
    """
    return by_device(_planar_tpu, _as_they_are, images)


def _planar_tpu(images):
    # Each device by itself: over several slices the compiler would gather the whole batch for it.
    return on_each_device(lambda images: with_layout_constraint(images, Layout((0, 3, 1, 2))), images)


def _as_they_are(images):
    return images


def normalise(images: jax.Array, mean, std, dtype) -> jax.Array:
    """Pixels `[B, H, W, 3]` in 0..255 to `(x / 255 - mean) / std`, computed in at least float32, in `dtype`."""
    wide = at_least_float32(dtype)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return ((images.astype(wide) / 255 - mean) / std).astype(dtype)


class Boxes(NamedTuple):
    """Rectangles of pixels, `low <= index < high`: int32, all of one shape."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array

    def mask(self, height: int, width: int) -> jax.Array:
        """True inside: the boxes' shape and `[height, width]`."""
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        top, bottom, left, right = (side[..., None, None] for side in self)
        return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def mix(key: jax.Array, images: jax.Array, targets: jax.Array, config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Mixes every image with its partner, image `i` of a group of `n` with image `n - 1 - i`, and their targets alike.

    A group is a run of rows, all that one process of the official code has: it draws and mixes by itself.

    Args:
      images: `[B, H, W, C]`, float, or uint8, which is then rounded to whole numbers (in float32).
      targets: `[B, K]`, distributions.
      config: `groups`, which divides B, `mixup` and `cutmix` (alphas of the Beta distributions, 0 is off), `prob`,
        `switch_prob` and `mode`: "batch" draws once for a group, "pair" for `i` and `n - 1 - i` together, "elem" for
        each image.

    Returns:
      Images, in their dtype if it is a float, and targets.
    """
    if not config.mixup and not config.cutmix:
        return images, targets
    batch, height, width, _ = images.shape
    weights, share = draw_mix(key, batch, height, width, config)
    wide = at_least_float32(images.dtype)
    weights = weights[..., None].astype(wide)
    mixed = weights * images.astype(wide) + (1 - weights) * _partners(images, config.groups).astype(wide)
    mixed = jnp.round(mixed) if images.dtype == jnp.uint8 else mixed.astype(images.dtype)
    share = share[:, None].astype(targets.dtype)
    return mixed, share * targets + (1 - share) * _partners(targets, config.groups)


def _partners(rows: jax.Array, groups: int) -> jax.Array:
    """`[B, ...]` with each of the runs of `B / groups` rows reversed: on one device each, no row leaves it."""
    return rows.reshape(groups, -1, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def draw_mix(key: jax.Array, batch: int, height: int, width: int, config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """What of each pixel, `[B, H, W]`, and of each target, `[B]`, stays an image's own."""
    size = batch // config.groups
    draws = config.groups * {"batch": 1, "pair": -(-size // 2), "elem": size}[config.mode]
    on_key, which_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    cut = jax.random.bernoulli(which_key, config.switch_prob, (draws,))
    if not (config.mixup and config.cutmix):
        cut = jnp.full((draws,), bool(config.cutmix))
    kept = _beta(mixup_key, config.mixup, draws)
    boxes = draw_cut(box_key, _beta(cutmix_key, config.cutmix, draws), height, width)
    inside = boxes.mask(height, width)
    # What a box covers after it was clipped at the border, and not what was drawn, is the partner's share.
    share = jnp.where(cut, 1 - inside.mean(axis=(1, 2)), kept)
    on = jax.random.bernoulli(on_key, config.prob, (draws,))
    share = jnp.where(on, share, 1.0)
    rows = jnp.arange(size)
    row = {"batch": jnp.zeros_like(rows), "pair": jnp.minimum(rows, size - 1 - rows), "elem": rows}[config.mode]
    row = (draws // config.groups * jnp.arange(config.groups)[:, None] + row).reshape(batch)
    # Draws become rows before they become pixels, so that weights need not be stored.
    inside, cut, kept, on = Boxes(*(side[row] for side in boxes)).mask(height, width), cut[row], kept[row], on[row]
    weights = jnp.where(cut[:, None, None], 1.0 - inside, kept[:, None, None])
    return jnp.where(on[:, None, None], weights, 1.0), share[row]


def draw_cut(key: jax.Array, kept: jax.Array, height: int, width: int) -> Boxes:
    """CutMix's boxes: sides are `sqrt(1 - kept)` of the image's, centres uniform, clipped at the border."""
    ratio = jnp.sqrt(1 - kept)
    row_key, column_key = jax.random.split(key)

    def side(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        half = (size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, kept.shape, 0, size)
        return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)

    return Boxes(*side(row_key, height), *side(column_key, width))


def erase(key: jax.Array, images: jax.Array, config: ConfigDict) -> jax.Array:
    """Fills up to `count` boxes of each image with noise, in a share `prob` of the images.

    Args:
      images: `[B, H, W, C]`, normalised floats.
      config: `prob`, `count` (their number is uniform in 1..count) and `mode`: "pixel" draws every value from N(0, 1),
        "rand" one colour a box, "const" is 0, the mean colour.
    """
    if not config.prob:
        return images
    batch, height, width, channels = images.shape
    on_key, count_key, box_key, fill_key = jax.random.split(key, 4)
    on = jax.random.bernoulli(on_key, config.prob, (batch,))
    count = jax.random.randint(count_key, (batch,), 1, config.count + 1)
    boxes = draw_erased(box_key, count, config.count, height, width)
    inside = boxes.mask(height, width) & (on[:, None] & (jnp.arange(config.count) < count[:, None]))[..., None, None]
    if config.mode == "pixel":
        fill = jax.random.normal(fill_key, images.shape, images.dtype)
        return jnp.where(inside.any(axis=1)[..., None], fill, images)
    for box in range(config.count):
        colour = jnp.zeros((), images.dtype)
        if config.mode == "rand":
            key = jax.random.fold_in(fill_key, box)
            colour = jax.random.normal(key, (batch, 1, 1, channels), images.dtype)
        images = jnp.where(inside[:, box, ..., None], colour, images)
    return images


def draw_erased(key: jax.Array, count: jax.Array, most: int, height: int, width: int) -> Boxes:
    """Boxes `[B, most]` of random erasing: of `TRIES` draws the first that fits; empty ones if none does.

    Area uniform in `ERASED_AREA` of the image, divided among `count` boxes; height / width log-uniform.
    """
    area_key, aspect_key, row_key, column_key = jax.random.split(key, 4)
    shape = (*count.shape, most, TRIES)
    area = jax.random.uniform(area_key, shape, minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    area = area * height * width / count[:, None, None]
    low, high = (jnp.log(jnp.float32(aspect)) for aspect in ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=low, maxval=high))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits, axis=-1)[..., None]
    rows, columns = (jnp.take_along_axis(jnp.where(fits, side, 0), first, axis=-1)[..., 0] for side in (rows, columns))
    top = jax.random.randint(row_key, rows.shape, 0, height - rows + 1)
    left = jax.random.randint(column_key, rows.shape, 0, width - columns + 1)
    return Boxes(top, top + rows, left, left + columns)


def _beta(key: jax.Array, alpha: float, draws: int) -> jax.Array:
    """Beta(alpha, alpha); ones where alpha is 0."""
    if alpha == 0:
        return jnp.ones((draws,))
    if alpha == 1:
        return jax.random.uniform(key, (draws,))
    # As jax.random.beta, whose two loops take twice as long to compile.
    logs = jax.random.loggamma(key, alpha, (2, draws))
    return jax.nn.sigmoid(logs[0] - logs[1])
