"""PiT against results of the official code, and properties of the network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import golden
from harness import assert_within, cubic_matrix, golden_run
from vitpyramid.models.attention import Block
from vitpyramid.models.layers import DropPath
from vitpyramid.models.pit import PiT, PoolConv, Stage
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.models.stack import stack_blocks
from vitpyramid.train.optim import decay_mask
from vitpyramid.weights import flax_to_torch, torch_to_flax

NAMES = [name for name in golden.manifest() if name.startswith("pit_")]
GOLDENS = [
    ("pit_ti_224x224", "float64"),
    ("pit_ti_224x224_small", "float64"),
    ("pit_ti_distilled_224x224", "float64"),
]
SIZES = [(224, 224), (192, 256), (225, 225), (200, 232), (256, 832), (384, 384), (448, 448), (100, 167), (16, 16)]

# Compiling is most of these tests' time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def little(**fields) -> PiT:
    """A PiT with two blocks in its second stage and one in the others, narrow enough to run anywhere."""
    return PiT((1, 2, 1), (8, 16, 32), (1, 2, 4), **{"image_size": 64, "num_classes": 5, **fields})


@functools.partial(quick_jit, static_argnums=0, static_argnames=("train", "method"))
def apply(model, variables, images, seed=0, *, train=False, method=None):
    """`model.apply` in one program; dropout draws from `seed`."""
    return model.apply(variables, images, train=train, method=method, rngs={"dropout": jax.random.key(seed)})


def random_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def shapes_of(model) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))


def random_variables(model, seed=0):
    """Variables at unit scale, so that every part of the network moves the output."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        return rng.standard_normal(leaf.shape).astype(np.float32) * max(0.1, fan_in**-0.5)

    return jax.tree.map(draw, shapes_of(model))


def grids(height: int, width: int, patch: int = 16, stride: int = 8) -> list[tuple[int, int]]:
    """The three stages' grids of a PiT: a convolution without padding, then two of kernel 3, stride 2, padding 1."""
    grid = ((height - patch) // stride + 1, (width - patch) // stride + 1)
    half = tuple((side + 2 - 3) // 2 + 1 for side in grid)
    return [grid, half, tuple((side + 2 - 3) // 2 + 1 for side in half)]


def taps(model, variables, images):
    logits, state = model.apply(
        variables,
        images,
        mutable="intermediates",
        capture_intermediates=lambda module, _: isinstance(module, Stage) or module.name == "norm",
    )
    found = {}
    for s in range(3):
        x, class_tokens = state["intermediates"][f"transformers_{s}"]["__call__"][0]
        found |= {f"stage{s + 1}": x.transpose(0, 3, 1, 2), f"stage{s + 1}_cls": class_tokens}
    return logits, {**found, "pooled": state["intermediates"]["norm"]["__call__"][0]}


@pytest.mark.parametrize("stem, precision", GOLDENS)
def test_equals_official_code(stem, precision):
    forward, train, _ = golden_run(stem, precision, taps)
    assert_within(forward | train, precision)


def test_gradient_reaches_every_parameter_but_key_biases():
    _, _, grads = golden_run("pit_ti_distilled_224x224", "float64", taps)
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    key_biases = 0
    for name, grad in grads.items():
        if name.endswith(".qkv.bias"):  # a constant added to all keys leaves the softmax as it is
            query, key, value = np.split(grad, 3)
            key_biases += 1
            assert np.linalg.norm(key) < 1e-12 * total, name
            assert min(np.linalg.norm(query), np.linalg.norm(value)) > 1e-6 * total, name
        assert np.linalg.norm(grad) > 1e-6 * total, name
    assert key_biases == 12


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_official_code_and_go_round(name):
    assert len(NAMES) == 8
    entry = golden.manifest()[name]
    variables = shapes_of(create_model(name))
    assert list(variables) == ["params"]
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in leaves) == entry["parameters"] == get_variant(name).params
    state_dict = {
        key: np.resize(np.arange(i, i + 30011, dtype=np.int16), shape)
        for i, (key, shape) in enumerate(entry["state_dict"].items())
    }
    back = flax_to_torch(name, torch_to_flax(name, state_dict))
    assert sorted(back) == sorted(state_dict)
    for key, array in state_dict.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_position_tables_of_other_image_sizes_are_read():
    for name, side in {"pit_b": 385, "pit_micro": 64}.items():
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of(create_model(name, image_size=side)))
        back = torch_to_flax(name, flax_to_torch(name, zeros))
        assert back["params"]["pos_embed"].shape == zeros["params"]["pos_embed"].shape
        assert back["params"]["pos_embed"].shape[1] != create_model(name).image_size // create_model(name).stride


def convolution_and_matmul_macs(jaxpr) -> int:
    """Multiply-accumulates of all matrix products and convolutions in a jaxpr."""
    macs = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
            macs += int(depth) * equation.outvars[0].aval.size
        if equation.primitive.name == "conv_general_dilated":
            macs += int(np.prod(equation.invars[1].aval.shape[:-1])) * equation.outvars[0].aval.size
        macs += sum(convolution_and_matmul_macs(p.jaxpr) for p in equation.params.values() if hasattr(p, "jaxpr"))
    return macs


@pytest.mark.parametrize("name", NAMES)
def test_multiply_accumulates_are_those_of_the_official_code(name):
    model, images = create_model(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    macs = convolution_and_matmul_macs(jax.make_jaxpr(model.apply)(shapes_of(model), images).jaxpr)
    pooled = grids(224, 224, model.patch, model.stride)[1:]  # these convolutions are not written as such
    macs += sum(9 * h * w * dim for (h, w), dim in zip(pooled, model.dims[1:], strict=True))
    assert macs == golden.manifest()[name]["macs"]
    assert macs / 1e9 == pytest.approx(get_variant(name).gmacs, rel=0.02)


@pytest.mark.parametrize("shape", [(2, 9, 6, 4), (1, 1, 2, 3), (2, 8, 7, 5)])
def test_pooling_is_the_grouped_convolution(shape):
    def convolve(params, x):
        return params["bias"] + jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    with jax.enable_x64(True):
        rng, dim = np.random.default_rng(0), shape[-1]
        x = rng.standard_normal(shape)
        params = {"kernel": rng.standard_normal((3, 3, 1, 2 * dim)), "bias": rng.standard_normal(2 * dim)}
        pool = PoolConv(2 * dim, jnp.float64)
        assert jax.tree.map(np.shape, pool.init(jax.random.key(0), x)["params"]) == jax.tree.map(np.shape, params)

        def loss(function):
            return quick_jit(jax.value_and_grad(lambda params, x: jnp.sum(function(params, x) ** 3), argnums=(0, 1)))

        expected = loss(convolve)(params, x)
        got = loss(lambda params, x: pool.apply({"params": params}, x))(params, x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, expected)


def level_shapes(model, height: int, width: int) -> list:
    """`[(shape, stride)]` of the pyramid of three images."""
    images = jax.ShapeDtypeStruct((3, height, width, 3), jnp.float32)
    levels = jax.eval_shape(functools.partial(model.apply, method="features"), shapes_of(model), images)
    return [(level.x.shape, level.stride) for level in levels]


@pytest.mark.parametrize("name", NAMES)
def test_features_have_their_strides_widths_and_grids(name):
    model = create_model(name)
    sides, strides = ((31, 16, 8), (7, 14, 28)) if name.startswith("pit_b") else ((27, 14, 7), (8, 16, 32))
    maps = [(3, side, side, dim) for side, dim in zip(sides, model.dims, strict=True)]
    assert level_shapes(model, 224, 224) == list(zip(maps, strides, strict=True))
    assert model.strides == strides


@pytest.mark.parametrize("name", ["pit_ti", "pit_b_distilled"])
@pytest.mark.parametrize("height, width", SIZES)
def test_grids_at_any_size(name, height, width):
    model = create_model(name, depths=(1, 1, 1))
    expected = grids(height, width, model.patch, model.stride)
    assert [shape[1:3] for shape, _ in level_shapes(model, height, width)] == expected


@pytest.mark.parametrize("size", [(225, 225), (100, 167), (256, 832), (16, 47), (448, 448)])
def test_any_size_equals_a_table_resized_by_hand(size):
    model, images = little(image_size=(224, 160)), random_images(1, *size)
    params = random_variables(model)["params"]
    (old, *_), (new, *_) = grids(224, 160), grids(*size)
    rows, columns = (cubic_matrix(a, b) for a, b in zip(old, new, strict=True))
    table = np.einsum("ph,qw,bhwc->bpqc", rows, columns, params["pos_embed"]).astype(np.float32)
    levels = apply(model, {"params": params}, images, method="features")
    by_hand = {"params": {**params, "pos_embed": table}}
    expected = apply(little(image_size=size), by_hand, images, method="features")
    assert [level.x.shape[1:3] for level in levels] == grids(*size)
    for level, right in zip(levels, expected, strict=True):
        assert golden.relative_error(level.x, right.x) < 1e-5


def test_rows_and_columns_beyond_a_patch_are_dropped_and_the_table_is_not_resized():
    """The one freedom of size that the official code has: 224 to 231 pixels give the same grid."""
    model, images = little(), random_images(2, 71, 70)
    variables = random_variables(model)
    logits = apply(model, variables, images)
    np.testing.assert_allclose(logits, apply(model, variables, images[:, :64, :64]), rtol=1e-5, atol=1e-6)
    assert golden.relative_error(apply(model, variables, np.roll(images, 4, axis=1)), logits) > 0.01


@pytest.mark.parametrize("name, shape", [("pit_ti", (1, 15, 64, 3)), ("pit_b", (1, 64, 13, 3)), ("pit_s", (64, 64, 3))])
def test_images_too_small_or_without_batch_are_refused(name, shape):
    model = create_model(name)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    assert str(shape) in str(error.value) and f"at least {model.patch}" in str(error.value)


def test_distilled_gives_two_logits_in_training_and_their_mean_otherwise():
    model, images = little(distilled=True), random_images(3, 64, 64)
    variables = random_variables(model)
    class_logits, distill_logits = apply(model, variables, images, train=True)
    assert class_logits.shape == distill_logits.shape == (3, 5)
    assert golden.relative_error(class_logits, distill_logits) > 0.1
    mean = apply(model, variables, images)
    np.testing.assert_allclose(mean, (class_logits + distill_logits) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(model, variables, images[1:2]), mean[1:2], rtol=1e-4, atol=1e-5)

    changed = jax.tree.map(np.array, variables)
    changed["params"]["head_dist"]["bias"] += 1
    changed_class, changed_distill = apply(model, changed, images, train=True)
    np.testing.assert_array_equal(changed_class, class_logits)
    np.testing.assert_allclose(changed_distill, distill_logits + 1, rtol=1e-5, atol=1e-5)


def test_remat_changes_nothing_but_recomputes():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    rngs = {"dropout": jax.random.key(1)}

    def loss(variables, remat):
        model = little(remat=remat, attn_drop_rate=0.1, drop_path_rate=0.5)
        return jnp.sum(model.apply(variables, images, train=True, rngs=rngs) ** 2)

    traced = [quick_jit(jax.value_and_grad(loss), static_argnums=1).trace(variables, remat) for remat in (False, True)]
    assert [str(program.jaxpr).count("remat") for program in traced] == [0, 4]
    plain, recomputed = (program.lower().compile()(variables) for program in traced)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, recomputed)


def test_scanned_blocks_are_the_same_blocks():
    model, images = little(), random_images(2, 64, 64)
    variables = random_variables(model)
    scanned = {"params": stack_blocks(variables["params"])}
    logits = apply(little(scan=True, remat=True), scanned, images)
    np.testing.assert_allclose(logits, apply(model, variables, images), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_and_its_logits_are_float32():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    half = little(dtype=jnp.bfloat16)
    logits, half_logits = apply(little(), variables, images), apply(half, variables, images)
    assert half_logits.dtype == jnp.float32
    assert 1e-5 < golden.relative_error(half_logits, logits) < 0.05
    levels = jax.eval_shape(functools.partial(half.apply, method="features"), variables, images)
    assert {level.x.dtype for level in levels} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype("float32")}


def test_bfloat16_is_finite_at_a_thousand_times_the_scale():
    model, images = little(dtype=jnp.bfloat16), 1000 * random_images(4, 64, 64)
    variables = random_variables(model)
    for key in ("pos_embed", "cls_token"):
        variables["params"][key] = 1000 * variables["params"][key]

    def loss(variables):
        logits, state = model.apply(variables, images, train=True, capture_intermediates=True)
        maps = [state["intermediates"][f"transformers_{s}"]["__call__"][0][0] for s in range(3)]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean(), (logits, maps)

    (value, (logits, maps)), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert logits.dtype == value.dtype == jnp.float32
    assert min(np.std(np.float32(x)) for x in maps) > 100
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, logits, grads)))


def test_attention_maps_are_sown():
    model, images = little(distilled=True), random_images(2, 64, 56)
    _, state = quick_jit(functools.partial(model.apply, mutable="intermediates"))(random_variables(model), images)
    maps = traverse_util.flatten_dict(state["intermediates"], sep="/")
    shapes = {
        "transformers_0/blocks_0": (2, 1, 44, 44),  # two class tokens and 7 x 6
        "transformers_1/blocks_1": (2, 2, 14, 14),  # 4 x 3
        "transformers_2/blocks_0": (2, 4, 6, 6),  # 2 x 2
    }
    for block, shape in shapes.items():
        (weights,) = maps[f"{block}/attn/attention"]
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def modules_called(kind: type, model, train: bool) -> list:
    """Modules of class `kind` in order of their calls."""
    modules, variables = [], shapes_of(model)

    def record(call, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            modules.append(context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        run = functools.partial(model.apply, train=train, rngs={"dropout": jax.random.key(0)})
        jax.eval_shape(run, variables, random_images(2, 64, 64))
    return modules


def test_drop_path_of_the_last_block_is_below_the_rate():
    model = little(drop_path_rate=0.4)
    rates = [0, 0.1, 0.2, 0.3]  # rate * i / 4, not a linspace that ends at the rate
    assert [block.drop_path for block in modules_called(Block, model, train=True)] == pytest.approx(rates)
    assert [branch.rate for branch in modules_called(DropPath, model, train=True)] == pytest.approx(np.repeat(rates, 2))
    assert [branch.rate for branch in modules_called(DropPath, model, train=False)] == [0] * 8


def test_dropout_acts_in_training_alone_and_only_at_a_rate():
    variables, images = random_variables(little()), random_images(2, 64, 64)
    logits = apply(little(), variables, images)
    np.testing.assert_allclose(apply(little(), variables, images, train=True), logits, rtol=1e-5, atol=1e-6)
    for rate in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        model = little(**{rate: 0.5})
        np.testing.assert_allclose(apply(model, variables, images), logits, rtol=1e-5, atol=1e-6)
        trained = apply(model, variables, images, 2, train=True)
        assert golden.relative_error(trained, logits) > 0.01
        assert golden.relative_error(apply(model, variables, images, 3, train=True), trained) > 0.01


def test_decay_spares_vectors_and_what_the_official_code_spares():
    model = little(distilled=True)
    mask = traverse_util.flatten_dict(decay_mask(shapes_of(model)["params"], model.no_weight_decay), sep="/")
    assert {path for path, decayed in mask.items() if decayed != path.endswith("kernel")} == set()
    assert {"pos_embed", "cls_token"} <= mask.keys()


def test_initialisation():
    """Official code: tables and class tokens normal .02, norms 1 and 0, everything else as PyTorch makes it."""
    model = create_model("pit_ti_distilled", depths=(1, 1, 1))
    variables = quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    fan_in = {path.rsplit("/", 1)[0]: x[..., 0].size for path, x in params.items() if path.endswith("kernel")}
    assert len(fan_in) == 1 + 4 * 3 + 2 * 2 + 2
    for path, x in params.items():
        module = path.rpartition("/")[0]
        if module in fan_in:
            bound = fan_in[module] ** -0.5
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=6 / np.sqrt(2 * x.size)), path
            assert 0.9 * bound < np.max(np.abs(x)) <= bound, path
            assert abs(np.mean(x)) < 6 * bound / np.sqrt(3 * x.size), path
        elif module:
            assert np.all(x == path.endswith("scale")), path
        else:
            assert np.std(x) == pytest.approx(0.02, rel=6 / np.sqrt(2 * x.size)), path
            assert abs(np.mean(x)) < 6 * 0.02 / np.sqrt(x.size), path
    assert sorted(path for path in params if "/" not in path) == ["cls_token", "pos_embed"]


def test_micro_is_for_small_images():
    model, variant = create_model("pit_micro"), get_variant("pit_micro")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == variant.params == 1_101_834
    assert jax.eval_shape(model.apply, variables, jnp.zeros((3, 32, 32, 3))).shape == (3, 10)
    assert variant.gmacs is None and variant.top1 is None
