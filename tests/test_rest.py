"""ResT against results of the official code, against a plain numpy form of it at any size, and its properties."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

import golden
import harness
from rest_by_hand import Numpy, torch_weights
from vitpyramid.models.layers import DropPath
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.models.rest import BatchNorm, Block, HeadMixing, ResT, instance_norm
from vitpyramid.train.sharding import make_mesh
from vitpyramid.weights import flax_to_torch, torch_to_flax

VARIANTS = {"rest_lite": 10_508_300, "rest_small": 13_679_708, "rest_base": 30_327_052, "rest_large": 51_676_156}
GOLDENS = [
    *((f"rest_{case}", "float64") for case in ("lite_224x224", "lite_224x224_small", "small_192x256", "small_190x253")),
    ("rest_lite_224x224", "float32"),
]
SIZES = [(224, 224), (192, 256), (225, 225), (200, 232), (256, 832), (384, 384), (448, 448), (100, 167), (32, 32)]

# Compiling is most of these tests' time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def little(**fields) -> ResT:
    """A ResT with two blocks in its third stage and one in the others, narrow enough to run anywhere."""
    fields = {"num_classes": 5, **fields}
    return ResT((1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(1, 2, 3, 4), **fields)


def two_stages(**fields) -> ResT:
    """Both kinds of attention and no more, for what has to be differentiated."""
    return ResT((1, 1), dims=(8, 16), heads=(1, 2), num_classes=5, **fields)


@functools.partial(quick_jit, static_argnums=0, static_argnames=("train", "method"))
def apply(model, variables, images, seed=0, *, train=False, method=None):
    """`model.apply` in one program; dropout draws from `seed`, updated statistics are left out."""
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, images, train=train, method=method, rngs=rngs, mutable="batch_stats")[0]


def random_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def random_variables(model, seed=0):
    """Variables at unit scale, so that every part of the network moves the output."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape).astype(np.float32) * float(max(0.1, np.prod(leaf.shape[:-1]) ** -0.5))
        return 0.5 + value**2 if path[-1].key == "var" else value

    return jax.tree_util.tree_map_with_path(draw, shapes)


def taps(model, variables, images):
    """Logits, the four maps and the head's input."""
    wanted = lambda module, method: method == "encode" or module.path == ("norm",)  # noqa: E731
    logits, state = model.apply(variables, images, capture_intermediates=wanted)
    captured = state["intermediates"]
    maps = {f"stage{s}": level.x.transpose(0, 3, 1, 2) for s, level in enumerate(captured["encode"][0], start=1)}
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
    model, images = little(), random_images(2, *size)
    variables = random_variables(model)
    by_hand = Numpy(torch_weights(variables), model)
    expected = by_hand.features(images)
    with jax.enable_x64(True):
        variables, images = jax.tree.map(jnp.float64, (variables, images))
        levels = apply(little(dtype=jnp.float64), variables, images, method="features")
    assert [level.x.shape[1:3] for level in levels] == list(zip(*map(halved, size), strict=True))
    for level, right in zip(levels, expected, strict=True):
        assert golden.relative_error(level.x.transpose(0, 3, 1, 2), right) < 1e-9
    if size == (32, 32):  # one query and one key
        assert not by_hand.attention["stage4.0.attn"].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_official_code(name):
    entry = golden.manifest()[name]
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(create_model(name).init, jax.random.key(0), images)
    assert sorted(variables) == ["batch_stats", "params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == VARIANTS[name] == entry["parameters"] == get_variant(name).params
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    torch = {key: list(array.shape) for key, array in flax_to_torch(name, zeros).items()}
    assert torch == entry["state_dict"]


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_the_identity(name):
    rng = np.random.default_rng(0)
    state_dict = {
        key: np.array(0) if key.endswith("num_batches_tracked") else rng.integers(0, 2**31, shape, np.int32)
        for key, shape in golden.manifest()[name]["state_dict"].items()
    }
    back = flax_to_torch(name, torch_to_flax(name, state_dict))
    assert sorted(back) == sorted(state_dict)
    for key, array in state_dict.items():
        assert back[key].dtype == array.dtype, key
        np.testing.assert_array_equal(back[key], array, key)


def test_micro_is_small():
    model = create_model("rest_micro")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == get_variant("rest_micro").params < 2e6
    assert jax.eval_shape(model.apply, variables, jnp.zeros((3, 32, 32, 3))).shape == (3, 10)


@pytest.mark.parametrize("name, dims", [("rest_lite", (64, 128, 256, 512)), ("rest_base", (96, 192, 384, 768))])
def test_features_have_their_strides_and_widths(name, dims):
    model = create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    for height, width in SIZES if name == "rest_lite" else SIZES[:1]:
        images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
        levels = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
        assert [level.stride for level in levels] == [4, 8, 16, 32]
        expected = zip([2] * 4, halved(height), halved(width), dims, strict=True)
        assert [level.x.shape for level in levels] == list(expected)


@pytest.mark.parametrize("shape", [(1, 0, 64, 3), (64, 64, 3)])
def test_images_without_pixels_or_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, H, W, C\]"):
        jax.eval_shape(create_model("rest_lite").init, jax.random.key(0), jnp.zeros(shape))


def test_a_batch_norm_of_one_value_is_refused_in_training():
    model, variables = little(), random_variables(little())
    run = functools.partial(model.apply, train=True, mutable="batch_stats")
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 32\) in training, expected more than one value"):
        jax.eval_shape(run, variables, random_images(1, 32, 32))
    assert jax.eval_shape(run, variables, random_images(2, 32, 32))[0].shape == (2, 5)


def test_samples_do_not_touch_in_evaluation_and_do_in_training():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    others = np.concatenate([images[:2], -images[2:]])
    for train in (False, True):
        left, right = (apply(little(), variables, batch, train=train)[:2] for batch in (images, others))
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
    model, images = little(), random_images(4, 64, 64)
    variables = random_variables(model)
    update = quick_jit(functools.partial(model.apply, train=True, mutable="batch_stats"))
    _, updated = update(variables, images)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updated), strict=True):
        assert old.dtype == new.dtype and np.all(old != new)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        jax.eval_shape(functools.partial(model.apply, train=True), variables, images)


def test_remat_changes_nothing_but_recomputes():
    variables, images = random_variables(two_stages()), random_images(4, 32, 32)
    others = {"batch_stats": variables["batch_stats"]}

    def loss(params, remat):
        model = two_stages(remat=remat, attn_drop_rate=0.1, drop_path_rate=0.5)
        options = {"train": True, "mutable": "batch_stats", "rngs": {"dropout": jax.random.key(1)}}
        logits, updated = model.apply({"params": params, **others}, images, **options)
        return jnp.sum(logits**2), (logits, updated)

    step = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    traced = [step.trace(variables["params"], remat) for remat in (False, True)]
    assert [str(program.jaxpr).count("remat") for program in traced] == [0, 2]
    plain, recomputed = (program.lower().compile()(variables["params"]) for program in traced)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), plain, recomputed)


def test_bfloat16_is_close_and_its_logits_are_float32():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    half = little(dtype=jnp.bfloat16)
    logits, half_logits = apply(little(), variables, images), apply(half, variables, images)
    assert half_logits.dtype == jnp.float32
    assert 1e-5 < golden.relative_error(half_logits, logits) < 0.2
    levels = jax.eval_shape(functools.partial(half.apply, method="features"), variables, images)
    assert {level.x.dtype for level in levels} == {jnp.dtype("bfloat16")}
    created = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}


def test_bfloat16_is_finite_at_large_activations():
    model, images = two_stages(dtype=jnp.bfloat16), 1e3 * random_images(4, 64, 64)
    variables = traverse_util.flatten_dict(random_variables(model), sep="/")
    for path in ("params/stem/conv3/kernel", "params/patch_embedding_2/norm/scale"):
        variables[path] = 1e3 * variables[path]  # these set the scale of the stages' residual streams
    variables = traverse_util.unflatten_dict(variables, sep="/")
    params = variables.pop("params")

    def run(params):
        levels, _ = model.apply({"params": params, **variables}, images, True, method="features", mutable="batch_stats")
        result = harness.loss_and_gradient(model, params, variables, images, jnp.arange(4))
        return [jnp.abs(level.x.astype(jnp.float32)).max() for level in levels], result

    largest, ((loss, updated), grads) = quick_jit(run)(params)
    assert min(largest) > 100
    leaves = jax.tree.leaves((loss, updated, grads))
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in leaves)


def test_attention_maps_are_sown():
    model, images = little(), random_images(2, 64, 93)
    run = quick_jit(functools.partial(model.apply, mutable="intermediates"))
    _, state = run(random_variables(model), images)
    maps = traverse_util.flatten_dict(state["intermediates"], sep="/")
    shapes = {
        "stage1_0": (2, 1, 384, 6),
        "stage2_0": (2, 2, 96, 6),
        "stage3_1": (2, 3, 24, 6),
        "stage4_0": (2, 4, 6, 6),
    }
    for block, shape in shapes.items():
        (weights,) = maps[f"{block}/attn/attention"]
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), block == "stage1_0", atol=2e-4)
        if block != "stage1_0":
            assert np.all(np.var(weights, axis=(2, 3)) > 0.1)


def calls_of(kind: type, model, train: bool, run=jax.eval_shape) -> tuple[list, list]:
    """Modules of class `kind` in order of their calls, and the calls' outputs, for 16 images."""
    modules = []

    def call_model(variables, images):
        outputs = []

        def record(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if isinstance(context.module, kind) and context.method_name == "__call__":
                modules.append(context.module)
                outputs.append(output)
            return output

        with nn.intercept_methods(record):
            model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(0)}, mutable="batch_stats")
        return outputs

    return modules, run(call_model, random_variables(model), random_images(16, 32, 32))


def test_drop_path_grows_from_zero_to_the_rate_over_all_blocks():
    model = little(drop_path_rate=0.4)
    rates = [0, 0.1, 0.2, 0.3, 0.4]
    assert [block.drop_path for block in calls_of(Block, model, train=True)[0]] == pytest.approx(rates)
    assert [branch.rate for branch in calls_of(DropPath, model, train=True)[0]] == pytest.approx(np.repeat(rates, 2))
    assert [branch.rate for branch in calls_of(DropPath, model, train=False)[0]] == [0] * 10


def test_drop_path_draws_anew_for_each_branch():
    _, outputs = calls_of(DropPath, two_stages(drop_path_rate=0.5), True, lambda f, *args: quick_jit(f)(*args))
    masks = [tuple(np.any(output, axis=(1, 2)).tolist()) for output in outputs]
    assert all(masks[0] + masks[1])  # the first block drops nothing
    assert masks[2] != masks[3] and not all(masks[2]) and not all(masks[3])


def test_dropout_acts_in_training_alone_and_only_at_a_rate():
    variables, images = random_variables(two_stages()), random_images(4, 32, 32)
    logits, trained = (apply(two_stages(), variables, images, train=train) for train in (False, True))
    for rate in ("drop_rate", "attn_drop_rate"):
        model = two_stages(**{rate: 0.3})
        np.testing.assert_array_equal(apply(model, variables, images), logits)
        dropped = apply(model, variables, images, train=True)
        assert golden.relative_error(dropped, trained) > 0.01
        np.testing.assert_array_equal(apply(model, variables, images, train=True), dropped)
        assert golden.relative_error(apply(model, variables, images, 1, train=True), dropped) > 0.01


def test_initialisation():
    """Official `_init_weights`: Linear and convolutions normal .02, Linear biases 0, convolutions' as PyTorch's."""
    images = jnp.zeros((1, 32, 32, 3))
    variables = quick_jit(ResT((1, 1), dims=(64, 128)).init)(jax.random.key(0), images)
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
    mixing = HeadMixing().init(jax.random.key(0), jnp.zeros((1, 64, 2, 2)))["params"]
    assert np.std(mixing["bias"]) == pytest.approx(64**-0.5 / 3**0.5, rel=0.4)
    assert np.std(mixing["kernel"]) == pytest.approx(0.02, rel=0.1)
