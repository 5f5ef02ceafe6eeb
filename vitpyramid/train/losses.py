"""Losses on logits and target distributions, in at least float32."""

import jax
import jax.numpy as jnp
import optax


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels `[B]` as distributions `[B, K]`: `1 - s + s / K` at the label, `s / K` elsewhere."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def distillation(logits: jax.Array, teacher: jax.Array, kind: str, tau: float) -> jax.Array:
    """What a student's logits `[B, K]` lose against a teacher's, per example: `[B]`.

    "hard": cross-entropy with the teacher's decision. "soft": Kullback-Leibler divergence of the distributions at
    temperature `tau`, times `tau ** 2 / K`: DeiT's `DistillationLoss`, whose mean is over all B * K numbers.
    """
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(teacher, axis=-1))
    ours, theirs = (jax.nn.log_softmax(x / tau) for x in (logits, teacher))
    return optax.losses.kl_divergence_with_log_targets(ours, theirs) * tau**2 / logits.shape[-1]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-sum(targets * log_softmax(logits))` per example: `[B, K], [B, K] -> [B]`."""
    return optax.softmax_cross_entropy(logits, targets)
