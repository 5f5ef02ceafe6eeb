"""Length of a run in steps, and the learning rate at each."""

import dataclasses

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How long a run is. Epochs count whole batches: `floor(examples / batch_size)` steps each, at least one."""

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: ConfigDict, num_examples: int) -> "Horizon":
        """Of a config on a training split of `num_examples`."""
        steps_per_epoch = max(1, num_examples // config.batch_size)
        return cls(steps_per_epoch, max(1, round(config.epochs * steps_per_epoch)))

    def steps(self, epochs: float) -> int:
        """`epochs` in steps, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))


def peak_lr(config: ConfigDict) -> float:
    """Largest learning rate of a run: `optim.lr`, scaled by the batch where `optim.lr_batch` says so."""
    optim = config.optim
    return optim.lr * (config.batch_size / optim.lr_batch if optim.lr_batch else 1.0)


def warmup_cosine(config: ConfigDict, horizon: Horizon) -> optax.Schedule:
    """Linear warm-up, then cosine: timm's `CosineLRScheduler` with one cycle, evaluated at every step.

    With `t` the time in epochs, `T` the length, `w` the warm-up: `warmup_lr + t (lr - warmup_lr) / w` before `w`, then
    `min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2`. The phase is `t / T`, not `(t - w) / (T - w)`.
    """
    lr, low = peak_lr(config), config.schedule.min_lr
    start, warmup = config.schedule.warmup_lr, config.schedule.warmup_epochs * horizon.steps_per_epoch

    def schedule(step):
        rising = start + step * ((lr - start) / max(warmup, 1.0))
        phase = jnp.minimum(step / horizon.total_steps, 1.0)
        return jnp.where(step < warmup, rising, low + 0.5 * (lr - low) * (1 + jnp.cos(jnp.pi * phase)))

    return schedule
