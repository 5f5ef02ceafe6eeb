"""Losses on logits and target distributions, in at least float32."""

import jax
import optax


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels `[B]` as distributions `[B, K]`: `1 - s + s / K` at the label, `s / K` elsewhere."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-sum(targets * log_softmax(logits))` per example: `[B, K], [B, K] -> [B]`."""
    return optax.softmax_cross_entropy(logits, targets)
