"""A regression of boxes, as a task: a bright rectangle in a map of noise, where is it?"""

import itertools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from vitpyramid.tasks import Task
from vitpyramid.tasks.metrics import Sum


@flax.struct.dataclass
class Worst(metrics.CollectingMetric.from_outputs(("overlap", "mask"))):
    """The smallest overlap: no sum over examples, so all of them come to the host."""

    def compute(self):
        values = super().compute()
        return values["overlap"][values["mask"]].min()


class Net(nn.Module):
    no_weight_decay = ()

    @nn.compact
    def __call__(self, maps, train=False):
        x = nn.relu(nn.Conv(16, (5, 5), 2)(maps[..., None])).reshape(len(maps), -1)
        return nn.sigmoid(nn.Dense(4)(nn.Dropout(0.05, deterministic=not train)(x)))  # top, left, bottom, right


def rows(seed, start, count=16):
    """Examples of a batch; those from number 100 on are padding."""
    rng = np.random.default_rng((seed, start))
    low = rng.integers(0, 9, (count, 2))
    high = low + rng.integers(4, 8, (count, 2))
    grid = np.arange(16)[None, :, None]
    inside = (grid >= low[:, None]) & (grid < high[:, None])  # [count, 16, 2]
    maps = inside[:, :, None, 0] & inside[:, None, :, 1]
    boxes, real = np.concatenate([low, high], axis=1) / 16, start + np.arange(count) < 100
    return {"map": np.float32(maps), "box": np.float32(boxes), "mask": real}


def overlap(a, b):
    sides = jnp.maximum(jnp.minimum(a[:, 2:], b[:, 2:]) - jnp.maximum(a[:, :2], b[:, :2]), 0)
    both = sides.prod(axis=-1)
    return both / ((a[:, 2:] - a[:, :2]).prod(axis=-1) + (b[:, 2:] - b[:, :2]).prod(axis=-1) - both)


def measure(boxes, batch):
    means = {"loss": jnp.abs(boxes - batch["box"]).mean(axis=-1), "iou": overlap(boxes, batch["box"])}
    worst = Worst.from_model_output(overlap=means["iou"], mask=batch["mask"])
    return {name: metrics.Average.from_model_output(value, mask=batch["mask"]) for name, value in means.items()} | {
        "worst": worst
    }


def make_task(config):
    return Task(
        config=config,
        title="boxes",
        unit="maps",
        model=Net(),
        network={},
        num_examples=lambda: 320,
        batch=lambda evaluation: {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in rows(0, 0).items()},
        train_batches=lambda step: (rows(s, 0) for s in itertools.count(step)),
        eval_batches=lambda: [rows(10**6, start) for start in range(0, 100, 16)],
        prepare=lambda key, batch, _: (batch["map"] + 0.1 * jax.random.normal(key, batch["map"].shape), batch["box"]),
        prepare_eval=lambda batch: batch["map"],
        loss=lambda boxes, targets: (
            jnp.abs(boxes - targets).mean(),
            {"wide": Sum.from_model_output(targets[:, 2] - targets[:, 0] > 0.4)},
        ),
        measure=measure,
        words=lambda values: "  ".join(f"{name} {value:.3f}" for name, value in values.items()),
        best="iou",
    )
