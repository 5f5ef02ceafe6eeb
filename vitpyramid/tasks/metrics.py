"""What steps and evaluations measure: clu metrics by name, merged over parts of a batch, batches, steps and hosts."""

import flax
import jax
import jax.numpy as jnp
from clu import metrics

Metrics = dict[str, metrics.Metric]


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


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of the examples of both."""
    return {name: metric.merge(second[name]) for name, metric in first.items()}


def compute(measured: Metrics) -> dict[str, float]:
    """The numbers; a metric whose `compute` returns several by name gives them all."""
    values = {}
    for name, metric in measured.items():
        value = metric.compute()
        values |= value if isinstance(value, dict) else {name: value}
    return {name: float(value) for name, value in values.items()}
