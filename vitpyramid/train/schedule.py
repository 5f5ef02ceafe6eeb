"""Length of a run in steps, and the learning rate at each."""

import dataclasses

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How long a run is.

    An epoch is `floor(examples / batch_size)` steps, at least one; with `schedule.round_up` `ceil(examples /
    batch_size)`, as where the authors keep the last batch with the few examples that are left. All batches here are
    full: the endless stream goes on into the next permutation.
    """

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, config: ConfigDict, num_examples: int) -> "Horizon":
        """Of a config on a training split of `num_examples`."""
        rest = config.batch_size - 1 if config.schedule.round_up else 0
        steps_per_epoch = max(1, (num_examples + rest) // config.batch_size)
        return cls(steps_per_epoch, max(1, round(config.epochs * steps_per_epoch)))

    def steps(self, epochs: float) -> int:
        """`epochs` in steps, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))


def peak_lr(config: ConfigDict) -> float:
    """Largest learning rate of a run: `optim.lr`, scaled by the batch where `optim.lr_batch` says so."""
    optim = config.optim
    return optim.lr * (config.batch_size / optim.lr_batch if optim.lr_batch else 1.0)


def make_schedule(config: ConfigDict, horizon: Horizon, factor: float = 1.0) -> optax.Schedule:
    """Learning rate at each step: linear warm-up, then what `schedule.name` says.

    "cosine" and "constant" are timm's schedulers with one cycle.

    With `t` the time in epochs, `T` the length without cooldown, `w` the warm-up: `warmup_lr + t (lr - warmup_lr) / w`
    before `w`; then `min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2`, or `lr` where `schedule.name` is "constant"; from
    `T` on `min_lr`, or `lr`. The phase is `t / T`, not `(t - w) / (T - w)`.

    "step" divides `lr` by 10 at each of `schedule.drops`; "poly" is `min_lr + (lr - min_lr) (1 - t / T) ** power`
    (mmdetection's and mmsegmentation's, detectron2's `WarmupMultiStepLR`).

    Where `schedule.per` is "epoch", `t` is the number of whole epochs done, less `schedule.lag`, at least 0. DeiT, PVT,
    PiT and ResT have a lag of 1: they call timm's `step(epoch)` after an epoch, so the first two have the same rate.

    Args:
      factor: of the peak; `min_lr` and `warmup_lr` stay, as in PyTorch's parameter groups.
    """
    schedule = config.schedule
    lr = factor * peak_lr(config)
    grows = config.batch_size / config.optim.lr_batch if schedule.scale_ends and config.optim.lr_batch else 1.0
    low, start = schedule.min_lr * grows, schedule.warmup_lr * grows
    per_epoch = schedule.per == "epoch"
    unit = 1 if per_epoch else horizon.steps_per_epoch  # of time, below
    warmup = schedule.warmup_epochs * unit
    length = (config.epochs - schedule.cooldown_epochs) * unit

    def learning_rate(step):
        time = jnp.maximum(step // horizon.steps_per_epoch - schedule.lag, 0) if per_epoch else step
        rising = start + time * ((lr - start) / max(warmup, 1e-9))
        if schedule.name == "constant":
            after = jnp.full_like(rising, lr)
        elif schedule.name == "step":
            drops = jnp.round(jnp.array(schedule.drops) * unit)
            after = lr * 0.1 ** jnp.sum(time >= drops)
        elif schedule.name == "poly":
            after = low + (lr - low) * (jnp.maximum(length - time, 0) / length) ** schedule.power
        else:
            # (1 + cos(pi t / T)) / 2, from what is left of T: exact to float32 near the end, where that cancels.
            after = low + (lr - low) * jnp.sin(jnp.pi / 2 * jnp.maximum(length - time, 0) / length) ** 2
        return jnp.where(time < warmup, rising, after)

    return learning_rate
