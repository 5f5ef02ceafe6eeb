"""Classification: accumulation, averages, distillation, and weights to start from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from two_heads import TwoHeads, assert_close, batch_of, config_of, one_step
from vitpyramid import create_model
from vitpyramid.models.registry import get_variant
from vitpyramid.tasks import ConfigError, classify, make_task
from vitpyramid.tasks.classify import distillation
from vitpyramid.train import loop
from vitpyramid.train.program import build
from vitpyramid.train.sharding import make_mesh
from vitpyramid.train.state import create_state, with_weights
from vitpyramid.weights.store import write_weights


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_are_those_of_the_large_batch(parts):
    _, whole, metrics = one_step(config_of())
    _, state, accumulated = one_step(config_of(**{"optim.accumulate": parts}))
    assert_close(state.params, whole.params)
    for name in ("loss", "top1", "top5", "grad_norm"):
        assert accumulated[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_average_with_warmup():
    """Decay of step t is min(decay, (1 + t) / (10 + t)): 0.1, 2 / 11."""
    config = config_of(**{"ema.decay": 0.9, "ema.warmup": True})
    start, first, _ = one_step(config)
    _, second, _ = one_step(config, steps=2)
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start.params, first.params)
    assert_close(first.ema["params"], expected)
    expected = jax.tree.map(lambda a, b: 2 / 11 * a + 9 / 11 * b, first.ema["params"], second.params)
    assert_close(second.ema["params"], expected)


def test_distillation_losses_by_hand():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7))
    p, q = (np.exp(x / 3.0) / np.exp(x / 3.0).sum(axis=1, keepdims=True) for x in (student, teacher))
    soft = (q * (np.log(q) - np.log(p))).sum(axis=1) * 9.0 / 7  # DeiT: F.kl_div(..., "sum") * T * T / numel
    np.testing.assert_allclose(distillation(student, teacher, "soft", 3.0), soft, rtol=1e-5)
    log_p = student - np.log(np.exp(student).sum(axis=1, keepdims=True))
    hard = -log_p[np.arange(5), teacher.argmax(axis=1)]
    np.testing.assert_allclose(distillation(student, teacher, "hard", 1.0), hard, rtol=1e-5)


def test_second_head_learns_from_the_teacher_and_the_first_from_the_labels(monkeypatch):
    """With the teacher's share 1, the class head stays; with 0, the other one."""
    model = TwoHeads()
    teacher = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    monkeypatch.setattr(classify, "_load_teacher", lambda config: (model, teacher))
    for alpha, stays, moves in ((1.0, "head", "head_dist"), (0.0, "head_dist", "head")):
        before, state, _ = one_step(config_of(**{"distill.alpha": alpha}), teacher)
        jax.tree.map(np.testing.assert_array_equal, before.params[stays], state.params[stays])
        assert not np.array_equal(before.params[moves]["kernel"], state.params[moves]["kernel"])
    config = config_of()
    before, _, metrics = one_step(config, teacher)
    batch = batch_of(config)
    variant = get_variant(config.model.name)
    images = (batch["image"] / 255 - np.array(variant.mean)) / np.array(variant.std)
    logits, other = model.apply({"params": before.params}, images, train=True)
    decided = model.apply(teacher, images).argmax(axis=1)
    losses = [-jax.nn.log_softmax(x)[np.arange(16), y].mean() for x, y in ((logits, batch["label"]), (other, decided))]
    assert metrics["loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["rest_micro", "regnety_micro"])
def test_frozen_statistics(name):
    """Batch norm as in evaluation, its statistics the same to the bit; dropout is that of training."""
    config = quickstart.get_config("rest")
    config.model.name, config.model.drop_path_rate, config.model.freeze_statistics = name, 0.0, True
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))

    def outputs(train):
        model, rngs = make_task(config).model, {"dropout": jax.random.key(2)}
        variables = jax.jit(model.init)(jax.random.key(1), images)
        variables["batch_stats"] = jax.tree.map(lambda x: x + 0.01, variables["batch_stats"])
        logits, updated = jax.jit(lambda v: model.apply(v, images, train=train, rngs=rngs, mutable=["batch_stats"]))(
            variables
        )
        jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
        return np.asarray(logits)

    np.testing.assert_array_equal(outputs(True), outputs(False))
    config.model.drop_rate = 0.5
    assert np.abs(outputs(True) - outputs(False)).max() > 0.01
    config.model.freeze_statistics = False
    with pytest.raises(AssertionError):
        outputs(True)


def test_dropout_of_the_token_module_can_be_turned_off():
    config = quickstart.get_config("t2t_vit")
    assert make_task(config).model.token_drop_rate == 0.1
    config.model.token_drop_rate = 0.0
    assert make_task(config).model.token_drop_rate == 0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of weights of deit_micro for 4 classes at 48 x 48, and these."""
    folder = tmp_path_factory.mktemp("weights")
    model = create_model("deit_micro", num_classes=4, image_size=48)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    write_weights(folder, {"name": "deit_micro", "num_classes": 4, "image_size": 48}, variables)
    return folder, variables


@pytest.mark.parametrize("scan", [False, True])
def test_a_run_starts_from_weights_with_its_own_head_and_size(pretrained, scan):
    folder, variables = pretrained
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {"model.name": "deit_micro", "model.remat": scan, "model.scan": scan, "ema.decay": 0.9}
    )
    config.init = str(folder)
    task = dataclasses.replace(make_task(config), num_examples=lambda: 640)
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        program = build(task, mesh)
        state = with_weights(create_state(program.init, program.state), task.initial())
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, program.state)
    kernel = variables["params"]["blocks_1"]["attn"]["qkv"]["kernel"]
    found = (
        state.params["blocks"]["attn"]["qkv"]["kernel"][1]
        if scan
        else state.params["blocks_1"]["attn"]["qkv"]["kernel"]
    )
    np.testing.assert_array_equal(found, kernel)
    jax.tree.map(np.testing.assert_array_equal, state.ema["params"], state.params)
    assert state.params["pos_embed"].shape == (1, 65, 192)


def test_unfit_weights_rules_and_teachers_are_config_errors(pretrained, tmp_path, data_dir):
    for changes, message in (
        ({"init": str(pretrained[0])}, "init = .*expected weights of pvt_micro, these are of deit_micro"),
        ({"init": str(tmp_path / "none.pth")}, "init = .*none.pth"),
        ({"distill.teacher": str(pretrained[0])}, "distill.teacher = .*expected 10 classes.*it has 4"),
        ({"optim.lr_rules": (("head", 1.0),)}, "optim.lr_rules: no rule covers"),
    ):
        config = quickstart.get_config()
        config.update_from_flattened_dict({"data.data_dir": data_dir, "compile_cache": "", **changes})
        with pytest.raises(ConfigError, match=message):
            loop.train(make_task(config), tmp_path / "run")
