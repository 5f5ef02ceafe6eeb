"""A network of two heads that compiles in no time, and training steps with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import quickstart
from vitpyramid.models.backbone import Stage
from vitpyramid.tasks import make_task
from vitpyramid.tasks.metrics import compute
from vitpyramid.train.optim import make_optimizer
from vitpyramid.train.schedule import Horizon
from vitpyramid.train.state import initial_state
from vitpyramid.train.step import make_train_step


class TwoHeads(nn.Module):
    """Compiles in no time; has all that a distilled network has."""

    dtype = jnp.float32
    no_weight_decay = ()
    stages = (Stage(("cls_token",), ("blocks_0",)),)
    after = ("head",)

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.tanh(nn.Dense(16, name="body")(images.reshape(len(images), -1)))
        logits, other = nn.Dense(10, name="head")(x), nn.Dense(10, name="head_dist")(x)
        return (logits, other) if train else (logits + other) / 2


def config_of(**changes):
    config = quickstart.get_config()
    config.batch_size = 16
    config.update_from_flattened_dict({"optim.name": "sgd", "optim.momentum": 0.0, "optim.lr": 1.0, **changes})
    config.update_from_flattened_dict({"optim.weight_decay": 0.0, "optim.clip_norm": 0.0, "loss.label_smoothing": 0.0})
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    return config


def batch_of(config, step=0):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (config.batch_size, 8, 8, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 10, config.batch_size, dtype=np.int32)}


def one_step(config, constants=None, steps=1):
    """States before and after, and the metrics of the last step."""
    task = dataclasses.replace(make_task(config), model=TwoHeads())
    params = task.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    optimizer = make_optimizer(config, Horizon.of(config, 160), params, task.model)
    state = before = initial_state({"params": params}, optimizer.tx, config.ema.decay > 0)
    step = jax.jit(make_train_step(task, optimizer, lambda step: 1.0))
    for s in range(steps):
        state, metrics = step(state, batch_of(config, s), constants or {})
    return before, state, compute(metrics)


def assert_close(left, right, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), left, right)
