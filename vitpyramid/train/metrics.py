"""What is measured on the device in each step."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Of one or more training steps."""

    loss: metrics.Average.from_output("loss")
    top1: metrics.Average.from_output("top1")
    top5: metrics.Average.from_output("top5")
    grad_norm: metrics.Average.from_output("grad_norm")
    lr: metrics.LastValue.from_output("lr")


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Of examples whose `mask` is True."""

    loss: metrics.Average.from_output("loss")
    top1: metrics.Average.from_output("top1")
    top5: metrics.Average.from_output("top5")


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1.0 where the label is among the `k` largest logits (all of them, if there are fewer): `[B, K], [B] -> [B]`."""
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1).astype(jnp.float32)
