"""Losses of detectors, of single predictions, and what their sums are divided by. All in at least float32."""

import jax
import jax.numpy as jnp


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`[...]` of logits and targets in 0 .. 1."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def focal(logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss of every logit: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5."""
    p = jax.nn.sigmoid(logits)
    off = p * (1 - targets) + (1 - p) * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * off**gamma * binary_cross_entropy(logits, targets)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`[...]` of logits `[..., K]` and labels int `[...]`."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def per_group(sums: jax.Array, counts: jax.Array, images: int | None) -> jax.Array:
    """Losses of a batch, normalised as devices with `images` images each and averaged gradients would do it.

    Args:
      sums: `[B, ...]`, of each image's losses.
      counts: `[B]`, of each image's part in the divisor.
      images: of a group; None: the whole batch.

    Returns:
      `[...]`: mean over groups of sums over counts, of which one is the least.

    Raises:
      ValueError: the batch is no multiple of `images`.
    """
    batch = sums.shape[0]
    images = images or batch
    if batch % images:
        raise ValueError(f"images_per_group = {images}: expected a divisor of the batch, which has {batch} images")
    totals = sums.reshape(-1, images, *sums.shape[1:]).sum(axis=1)
    divisors = jnp.maximum(counts.reshape(-1, images).sum(axis=1).astype(sums.dtype), 1)
    return (totals / divisors.reshape(-1, *(1,) * (sums.ndim - 1))).mean(axis=0)


def by_level(values: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """Sums over parts of the last axis, of these lengths: `[..., N]` -> `[..., levels]`."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return jnp.stack([values[..., end - n : end].sum(-1) for end, n in zip(ends, lengths, strict=True)], axis=-1)
