"""ResT against results of the official code, against a plain numpy form of it at any size, and its properties."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

import golden
import harness
from harness import apply, random_images, random_variables
from rest_by_hand import Numpy, torch_weights
from vitpyramid.models.rest import BatchNorm, HeadMixing, ResT
from vitpyramid.models.rest_forms import instance_norm
from vitpyramid.train.sharding import make_mesh

GOLDENS = [
    *((f"rest_{case}", "float64") for case in ("lite_224x224", "lite_224x224_small", "small_192x256", "small_190x253")),
    ("rest_lite_224x224", "float32"),
]
LITTLE = harness.NARROW["rest"]


def taps(model, variables, images):
    """Logits, the four maps and the head's input."""
    wanted = lambda module, method: method == "encode" or module.path == ("norm",)  # noqa: E731
    logits, state = model.apply(variables, images, capture_intermediates=wanted)
    captured = state["intermediates"]
    levels, _ = captured["encode"][0]
    maps = {f"stage{s}": level.x.transpose(0, 3, 1, 2) for s, level in enumerate(levels, start=1)}
    return logits, {**maps, "pooled": captured["norm"]["__call__"][0].mean((1, 2))}


@pytest.mark.parametrize("stem, precision", GOLDENS)
def test_equals_official_code(stem, precision):
    forward, train, _ = harness.golden_run(stem, precision, taps)
    assert len([key for key in train if key.startswith("running")]) == 2 * 5
    harness.assert_within(forward | train, precision, "rest")


def test_gradient_reaches_every_parameter_that_matters():
    _, _, grads = harness.golden_run("rest_lite_224x224", "float64", taps)
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    # Behind a softmax over keys or an instance norm, and before a batch norm, constants vanish.
    null = {f"patch_embed_{stage}.conv.bias" for stage in (2, 3, 4)}
    for block in [f"stage{stage}.{j}.attn" for stage in (2, 3, 4) for j in (0, 1)]:
        null |= {f"{block}.kv.bias", f"{block}.transform_conv.bias", f"{block}.sr_norm.bias"}
    assert null - set(grads) == {"stage4.0.attn.sr_norm.bias", "stage4.1.attn.sr_norm.bias"}  # stage 4 has no reduction
    for name, grad in grads.items():
        if name in null:
            assert np.linalg.norm(grad) < 1e-12 * total, name
            continue
        if name.endswith(".kv.bias"):  # stage 1: [key | value]
            key, grad = np.split(grad, 2)
            assert np.linalg.norm(key) < 1e-12 * total, name
        assert np.linalg.norm(grad) > 1e-6 * total, name


def halved(side: int) -> list[int]:
    """Sides of the four stages' grids."""
    sides = [side]
    for _ in range(5):
        sides.append((sides[-1] + 1) // 2)
    return sides[2:]


@pytest.mark.parametrize("size", [(64, 93), (225, 225), (200, 232), (100, 167), (32, 32), (1, 33)])
def test_any_size_equals_the_formulas(size):
    model, images = LITTLE, random_images(2, *size)
    variables = random_variables(model)
    by_hand = Numpy(torch_weights(variables), model)
    expected = by_hand.features(images)
    with jax.enable_x64(True):
        variables, images = jax.tree.map(jnp.float64, (variables, images))
        levels = apply(LITTLE.clone(dtype=jnp.float64), variables, images, method="features")
    assert [level.x.shape[1:3] for level in levels] == list(zip(*map(halved, size), strict=True))
    for level, right in zip(levels, expected, strict=True):
        assert golden.relative_error(level.x.transpose(0, 3, 1, 2), right) < 1e-9
    if size == (32, 32):  # one query and one key
        assert not by_hand.attention["stage4.0.attn"].any()


def test_a_batch_norm_of_one_value_is_refused_in_training():
    model, variables = LITTLE, random_variables(LITTLE)
    run = functools.partial(model.apply, train=True, mutable="batch_stats")
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 32\) in training, expected more than one value"):
        jax.eval_shape(run, variables, random_images(1, 32, 32))
    assert jax.eval_shape(run, variables, random_images(2, 32, 32))[0].shape == (2, 5)


def test_samples_do_not_touch_in_evaluation_and_do_in_training():
    variables, images = random_variables(LITTLE), random_images(4, 64, 64)
    others = np.concatenate([images[:2], -images[2:]])
    for train in (False, True):
        left, right = (apply(LITTLE, variables, batch, train=train)[:2] for batch in (images, others))
        assert (golden.relative_error(left, right) > 0.01) if train else np.array_equal(left, right)


def batch_norm(x, variables, train, dtype=jnp.float32):
    return BatchNorm(train, dtype).apply(variables, x, mutable="batch_stats")


BATCH_NORM_VARIABLES = {
    "params": {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, -1])},
    "batch_stats": {"mean": np.float32([5, 0, 0]), "var": np.float32([1, 4, 9])},
}


def test_batch_norm_has_pytorch_semantics():
    x = np.random.default_rng(0).normal(100, 0.1, (4, 2, 1, 3)).astype(np.float32)  # large mean: two passes are needed
    params, old = BATCH_NORM_VARIABLES["params"], BATCH_NORM_VARIABLES["batch_stats"]
    mean, var = np.float64(x).mean((0, 1, 2)), np.float64(x).var((0, 1, 2))
    out, updated = batch_norm(x, BATCH_NORM_VARIABLES, True)
    expected = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * old["var"] + 0.1 * var * 8 / 7, rtol=1e-6)

    out, updated = batch_norm(x, BATCH_NORM_VARIABLES, False)
    expected = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, dict(updated["batch_stats"]), old)


def test_batch_norm_statistics_stay_float32_and_start_at_a_normal():
    x = np.random.default_rng(0).normal(30, 1, (8, 2, 2, 3)).astype(jnp.bfloat16)
    variables = BatchNorm(True, jnp.bfloat16).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], {"mean": np.zeros(3), "var": np.ones(3)})
    out, updated = batch_norm(x, variables, True, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * np.float64(x).mean((0, 1, 2)), rtol=1e-5)


def test_batch_norm_statistics_are_those_of_the_whole_batch_over_devices():
    x = np.random.default_rng(0).normal(0, np.arange(1, 9)[:, None, None, None], (8, 2, 2, 3)).astype(np.float32)
    alone, expected = batch_norm(x, BATCH_NORM_VARIABLES, True)
    mesh = make_mesh(fsdp=1)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        assert len(split.addressable_shards) == 8 and split.addressable_shards[0].data.shape[0] == 1
        out, updated = jax.jit(functools.partial(batch_norm, train=True))(split, BATCH_NORM_VARIABLES)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updated, expected)


def test_instance_norm_takes_the_whole_map_in_two_passes():
    x = np.random.default_rng(0).normal(100, 0.1, (2, 3, 20, 7)).astype(np.float32)
    centred = x - np.float64(x).mean((2, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(instance_norm(jnp.asarray(x)), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(instance_norm(jnp.ones((2, 3, 4, 1))), 0)


def test_training_updates_statistics_and_needs_them_mutable():
    model, images = LITTLE, random_images(4, 64, 64)
    variables = random_variables(model)
    update = jax.jit(functools.partial(model.apply, train=True, mutable="batch_stats"))
    _, updated = update(variables, images)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updated), strict=True):
        assert old.dtype == new.dtype and np.all(old != new)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        jax.eval_shape(functools.partial(model.apply, train=True), variables, images)


def test_initialisation():
    """Official `_init_weights`: Linear and convolutions normal .02, Linear biases 0, convolutions' as PyTorch's."""
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(ResT((1, 1), dims=(64, 128)).init)(jax.random.key(0), images)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    fan_in = {path.rsplit("/", 1)[0]: x[..., 0].size for path, x in params.items() if x.ndim == 4}
    assert len(fan_in) == 3 + 1 + 2 + 2 + 1
    for path, x in params.items():
        module, leaf = path.rsplit("/", 1)
        if leaf == "kernel":
            assert np.std(x) == pytest.approx(0.02, rel=6 / np.sqrt(2 * x.size)), path
            assert abs(np.mean(x)) < 6 * 0.02 / np.sqrt(x.size), path
        elif leaf == "scale":
            assert np.all(x == 1), path
        elif module not in fan_in:
            assert np.all(x == 0), path
        else:
            bound = fan_in[module] ** -0.5
            assert np.max(np.abs(x)) <= bound, path
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=6 / np.sqrt(2 * x.size)), path
    mixing = HeadMixing(64).init(jax.random.key(0))["params"]
    assert np.std(mixing["bias"]) == pytest.approx(64**-0.5 / 3**0.5, rel=0.4)
    assert np.std(mixing["kernel"]) == pytest.approx(0.02, rel=0.1)
