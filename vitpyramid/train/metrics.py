"""What is measured on the device in each step."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class Sum(metrics.Metric):
    """Sum over examples."""

    total: jax.Array

    @classmethod
    def empty(cls) -> "Sum":
        return cls(jnp.zeros(()))

    @classmethod
    def from_model_output(cls, values: jax.Array, **_) -> "Sum":
        return cls(jnp.sum(values.astype(jnp.float32)))

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total)

    def compute(self) -> jax.Array:
        return self.total


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Of one or more training steps; `skipped` counts examples that stand for others that could not be read."""

    loss: metrics.Average.from_output("loss")
    top1: metrics.Average.from_output("top1")
    top5: metrics.Average.from_output("top5")
    grad_norm: metrics.Average.from_output("grad_norm")
    lr: metrics.LastValue.from_output("lr")
    skipped: Sum.from_output("skipped")


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Of examples whose `mask` is True; `skipped` counts those that could not be read."""

    loss: metrics.Average.from_output("loss")
    top1: metrics.Average.from_output("top1")
    top5: metrics.Average.from_output("top5")
    skipped: Sum.from_output("skipped")


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1.0 where the label is among the `k` largest logits (all of them, if there are fewer): `[B, K], [B] -> [B]`."""
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1).astype(jnp.float32)
