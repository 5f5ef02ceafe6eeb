"""Rules over parameters, accumulation, averages, distillation, and weights to start from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

from configs import quickstart
from vitpyramid import create_model, load_pretrained
from vitpyramid.models.backbone import Stage
from vitpyramid.models.registry import get_variant
from vitpyramid.train import loop
from vitpyramid.train.config import ConfigError
from vitpyramid.train.losses import distillation
from vitpyramid.train.mesh import make_mesh
from vitpyramid.train.optim import layers_to_head, lr_factors, make_optimizer
from vitpyramid.train.program import build
from vitpyramid.train.schedule import Horizon
from vitpyramid.train.state import TrainState, create_state, with_weights
from vitpyramid.train.step import make_train_step
from vitpyramid.weights.store import write_weights


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


def one_step(config, teacher=None, teacher_variables=None, steps=1):
    """States before and after, and the metrics of the last step."""
    model = TwoHeads()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    horizon = Horizon.of(config, 160)
    optimizer = make_optimizer(config, horizon, params, model)
    ema = {"params": jax.tree.map(jnp.copy, params)} if config.ema.decay else {}
    state = before = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.tx.init(params), ema)
    step = jax.jit(make_train_step(config, model, optimizer, lambda step: 1.0, teacher))
    for s in range(steps):
        state, metrics = step(state, batch_of(config, s), teacher_variables or {})
    return before, state, metrics.compute()


def assert_close(left, right, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), left, right)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_are_those_of_the_large_batch(parts):
    _, whole, metrics = one_step(config_of())
    _, state, accumulated = one_step(config_of(**{"optim.accumulate": parts}))
    assert_close(state.params, whole.params)
    for name in ("loss", "top1", "top5", "grad_norm"):
        assert float(accumulated[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name


def test_frozen_parameters_stay_and_do_not_count_in_the_norm():
    rules = (("^head/", 1.0), ("^head_dist/", 0.5), (".*", 0.0))
    before, state, metrics = one_step(config_of(**{"optim.lr_rules": rules, "optim.name": "adamw"}))
    jax.tree.map(np.testing.assert_array_equal, before.params["body"], state.params["body"])
    assert not np.array_equal(before.params["head"]["kernel"], state.params["head"]["kernel"])
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("body" in jax.tree_util.keystr(path) for path, _ in moments)
    _, _, all_metrics = one_step(config_of())
    assert 0 < float(metrics["grad_norm"]) < float(all_metrics["grad_norm"])


def test_rates_by_path_multiply_the_step():
    before, plain, _ = one_step(config_of())
    _, ruled, _ = one_step(config_of(**{"optim.lr_rules": (("head", 1.0), ("body", 0.25))}))
    moved, ruled_moved = (jax.tree.map(jnp.subtract, state.params, before.params) for state in (plain, ruled))
    assert_close(ruled_moved["head"], moved["head"])
    assert_close(ruled_moved["body"], jax.tree.map(lambda x: 0.25 * x, moved["body"]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [((("head", 1.0),), "no rule covers body/"), (((".*", 1.0), ("head", 0.1)), "covers no parameter that an earlier")],
)
def test_every_parameter_needs_a_rule_and_every_rule_a_parameter(rules, message):
    params = {"body": {"kernel": 0, "bias": 0}, "head": {"kernel": 0}}
    with pytest.raises(ValueError, match=message):
        lr_factors(params, rules)


def depths(name: str) -> dict:
    model = get_variant(name).model
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return traverse_util.flatten_dict(layers_to_head(params, model), sep="/")


def test_layers_to_head():
    pvt = depths("pvt_tiny")  # 2 blocks a stage
    for path, depth in {
        "head/kernel": 0,
        "norm/scale": 0,
        "block4_1/attn/q/kernel": 1,
        "block4_0/norm1/bias": 2,
        "patch_embed4/proj/kernel": 3,
        "pos_embed4": 3,
        "cls_token": 3,
        "block3_1/mlp/fc1/kernel": 3,
        "block1_0/attn/q/kernel": 8,
        "patch_embed1/proj/kernel": 9,
    }.items():
        assert pvt[path] == depth, path
    pit = depths("pit_ti")  # 2, 6, 4 blocks
    assert (pit["transformers_2/blocks_3/norm1/scale"], pit["pools_1/fc/kernel"]) == (1, 5)
    assert (pit["transformers_1/blocks_5/norm1/scale"], pit["pools_0/fc/kernel"], pit["pos_embed"]) == (5, 11, 13)
    t2t = depths("t2t_vit_7")
    assert (t2t["blocks_6/mlp/fc1/bias"], t2t["tokens_to_token/project/kernel"], t2t["cls_token"]) == (1, 8, 8)
    rest = depths("rest_lite")
    assert (rest["stage4_1/norm1/scale"], rest["patch_embedding_4/conv/kernel"], rest["stem/conv1/kernel"]) == (1, 3, 9)
    regnety = depths("regnety_160")  # 2, 4, 11, 1 blocks
    found = [regnety[f"{path}/conv/kernel"] for path in ("s4/b1/conv1", "s3/b11/conv3", "s1/b1/downsample", "stem")]
    assert found == [1, 2, 18, 19]


def test_a_parameter_of_no_layer_is_named():
    with pytest.raises(ValueError, match="body/kernel: expected in the stages of TwoHeads"):
        layers_to_head({"head": {"kernel": 0}, "body": {"kernel": 0}}, TwoHeads())


def test_layer_decay_multiplies_the_step():
    params = {"head": {"kernel": jnp.ones(3)}, "blocks_0": {"kernel": jnp.ones(3)}, "cls_token": jnp.ones(3)}
    config = config_of(**{"optim.layer_decay": 0.5})
    tx = make_optimizer(config, Horizon.of(config, 160), params, TwoHeads()).tx
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(updates[key]["kernel"][0]) for key in ("head", "blocks_0")] == [-1.0, -0.5]
    assert float(updates["cls_token"][0]) == -0.25


def test_sgd_is_pytorchs():
    """Decay joins the gradient; momentum without dampening: torch.optim.SGD, two steps by hand."""
    config = config_of(**{"optim.momentum": 0.9, "optim.lr": 0.1, "optim.decay_vectors": True})
    config.optim.weight_decay = 0.5
    params = {"head": {"bias": jnp.array([1.0])}}
    tx = make_optimizer(config, Horizon.of(config, 160), params, TwoHeads()).tx
    state, velocity, x = tx.init(params), 0.0, 1.0
    for gradient in (2.0, -1.0):
        updates, state = tx.update({"head": {"bias": jnp.array([gradient])}}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + gradient + 0.5 * x
        x -= 0.1 * velocity
        assert float(params["head"]["bias"][0]) == pytest.approx(x, rel=1e-6)


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


def test_second_head_learns_from_the_teacher_and_the_first_from_the_labels():
    """With the teacher's share 1, the class head stays; with 0, the other one."""
    model = TwoHeads()
    teacher = model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    for alpha, stays, moves in ((1.0, "head", "head_dist"), (0.0, "head_dist", "head")):
        before, state, _ = one_step(config_of(**{"distill.alpha": alpha}), model, teacher)
        jax.tree.map(np.testing.assert_array_equal, before.params[stays], state.params[stays])
        assert not np.array_equal(before.params[moves]["kernel"], state.params[moves]["kernel"])
    config = config_of()
    before, _, metrics = one_step(config, model, teacher)
    batch = batch_of(config)
    variant = get_variant(config.model.name)
    images = (batch["image"] / 255 - np.array(variant.mean)) / np.array(variant.std)
    logits, other = model.apply({"params": before.params}, images, train=True)
    decided = model.apply(teacher, images).argmax(axis=1)
    losses = [-jax.nn.log_softmax(x)[np.arange(16), y].mean() for x, y in ((logits, batch["label"]), (other, decided))]
    assert float(metrics["loss"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


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
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        program = build(config, 640, mesh)
        _, loaded = load_pretrained(folder, "deit_micro", num_classes=10, image_size=32)
        state = with_weights(create_state(program.init, program.state), loaded, program.model)
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
            loop.train(config, tmp_path / "run")
