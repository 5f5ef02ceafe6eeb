"""Learning rate and weight decay against values worked out by hand and by timm's rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from vitpyramid import create_model
from vitpyramid.train.optim import decay_mask, make_optimizer
from vitpyramid.train.schedule import Horizon, make_schedule, peak_lr


def test_horizon_counts_whole_batches():
    config = base.get_config()
    horizon = Horizon.of(config, 1_281_167)
    assert (horizon.steps_per_epoch, horizon.total_steps) == (1251, 375_300)
    assert horizon.steps(0.5) == 626  # 625.5, rounded to even
    config.epochs = 0.001
    assert Horizon.of(config, 10).total_steps == 1


def test_lr_grows_with_the_batch_unless_absolute():
    config = base.get_config()
    assert peak_lr(config) == pytest.approx(1e-3)
    config.batch_size = 256
    assert peak_lr(config) == pytest.approx(2.5e-4)
    config.optim.lr_batch = 0
    assert peak_lr(config) == pytest.approx(5e-4)


@pytest.mark.parametrize("warmup", [5.0, 0.0])
def test_warmup_cosine_follows_timm(warmup):
    """timm's epoch formula, written out in float64, at whole and half epochs."""
    config = base.get_config()
    config.schedule.warmup_epochs = warmup
    schedule = make_schedule(config, Horizon.of(config, 1_281_167))
    for epoch in (0, 0.5, 1, 4.5, 5, 5.5, 100, 299, 300):
        if epoch < warmup:
            expected = 1e-6 + epoch * (1e-3 - 1e-6) / warmup
        else:
            expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300))
        step = round(epoch * 1251)
        tolerance = 2e-6 if epoch == int(epoch) else 2e-3  # half epochs are not whole steps
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=tolerance), epoch


def test_schedule_stays_at_the_end():
    config = base.get_config()
    schedule = make_schedule(config, Horizon.of(config, 1_281_167))
    assert float(schedule(400_000)) == pytest.approx(1e-5)


def test_decay_mask_of_pvt():
    """No vector and no class token; position tables are decayed (ndim 3 and not in PVT's no_weight_decay)."""
    model = create_model("pvt_micro")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    mask = decay_mask(params, model.no_weight_decay)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): m
        for path, m in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert not flat["cls_token"]
    assert flat["pos_embed1"]
    assert flat["pos_embed4"]
    for name, decayed in flat.items():
        leaf = name.split("/")[-1]
        assert decayed == (leaf == "kernel" or leaf.startswith("pos_embed")), name


def test_optimizer_is_adamw_with_decoupled_decay_and_clipping():
    """Three steps against AdamW written out in numpy (Loshchilov & Hutter, Algorithm 2), clipped by global norm."""
    config = base.get_config()
    config.optim.clip_norm, config.optim.weight_decay = 1.0, 0.05
    lr = 0.01
    config.optim.lr, config.optim.lr_batch = lr, 0
    config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    ours = jax.tree.map(jnp.float32, params)
    tx = make_optimizer(config, Horizon.of(config, 1_281_167), ours, create_model("pvt_micro")).tx
    state = tx.init(ours)
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t in range(1, 4):
        grads = {k: rng.normal(size=p.shape) * 10 ** (1 - t) for k, p in params.items()}
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, p in params.items():
            g = grads[k] * min(1.0, 1.0 / norm)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            step = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            params[k] = p - lr * (step + (0.05 * p if p.ndim > 1 else 0))
    for k, p in params.items():
        np.testing.assert_allclose(ours[k], p, rtol=1e-5, atol=1e-7)
