"""DeiT against results of timm's, and properties of the network."""

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
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.models.stack import stack_blocks
from vitpyramid.models.vit import ViT
from vitpyramid.train.optim import decay_mask
from vitpyramid.weights import flax_to_torch, torch_to_flax

NAMES = [name for name in golden.manifest() if name.startswith("deit_")]
GOLDENS = [
    ("deit_tiny_224x224", "float64"),
    ("deit_tiny_224x224_small", "float64"),
    ("deit_tiny_distilled_224x224", "float64"),
    ("deit_tiny_distilled_224x224", "float32"),
]
SIZES = [(224, 224), (192, 256), (225, 225), (200, 232), (256, 832), (384, 384), (448, 448), (100, 167), (16, 16)]

# Compiling is most of these tests' time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def little(**fields) -> ViT:
    """A ViT with three blocks, narrow enough to run anywhere."""
    return ViT(24, heads=3, **{"depth": 3, "image_size": 64, "num_classes": 5, **fields})


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


def taps(model, variables, images):
    logits, state = model.apply(
        variables,
        images,
        mutable="intermediates",
        capture_intermediates=lambda module, method: method == "encode" or module.name == "norm",
    )
    ((level,), _) = state["intermediates"]["encode"][0]
    return logits, {"stage1": level.x.transpose(0, 3, 1, 2), "pooled": state["intermediates"]["norm"]["__call__"][0]}


@pytest.mark.parametrize("stem, precision", GOLDENS)
def test_equals_timm(stem, precision):
    forward, train, _ = golden_run(stem, precision, taps)
    assert_within(forward | train, precision)


def test_gradient_reaches_every_parameter_but_key_biases():
    _, _, grads = golden_run("deit_tiny_distilled_224x224", "float64", taps)
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
def test_parameters_are_those_of_timm_and_go_round(name):
    assert len(NAMES) == 6
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


@pytest.mark.parametrize("name, side", [("deit_tiny", 384), ("deit_tiny_distilled", 160), ("deit_micro", 48)])
def test_position_tables_of_other_image_sizes_are_read(name, side):
    model = create_model(name)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of(model.clone(image_size=side)))
    back = torch_to_flax(name, flax_to_torch(name, zeros))
    expected = (1, 1 + model.distilled + (side // model.patch) ** 2, model.dim)
    assert back["params"]["pos_embed"].shape == zeros["params"]["pos_embed"].shape == expected


def test_position_tables_that_fit_no_image_are_refused():
    weights = {key: np.zeros(shape, np.int8) for key, shape in golden.manifest()["deit_tiny"]["state_dict"].items()}
    for rows in (0, 1, 200):
        with pytest.raises(ValueError, match="pos_embed"):
            torch_to_flax("deit_tiny", {**weights, "pos_embed": np.zeros((1, rows, 192))})


def matmul_macs(jaxpr) -> int:
    """Multiply-accumulates of all matrix products in a jaxpr."""
    macs = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
            macs += int(depth) * equation.outvars[0].aval.size
        macs += sum(matmul_macs(p.jaxpr) for p in equation.params.values() if hasattr(p, "jaxpr"))
    return macs


@pytest.mark.parametrize("name", NAMES)
def test_multiply_accumulates_are_those_of_timm(name):
    model, images = create_model(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    macs = matmul_macs(jax.make_jaxpr(model.apply)(shapes_of(model), images).jaxpr)
    assert macs == golden.manifest()[name]["macs"]
    assert macs / 1e9 == pytest.approx(get_variant(name).gmacs, abs=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_the_pyramid_is_one_map(name):
    model, images = create_model(name), jax.ShapeDtypeStruct((2, 192, 256, 3), jnp.float32)
    (level,) = jax.eval_shape(functools.partial(model.apply, method="features"), shapes_of(model), images)
    assert (level.x.shape, level.stride) == ((2, 12, 16, model.dim), 16)
    assert model.strides == (16,)


@pytest.mark.parametrize("height, width", SIZES)
def test_grids_at_any_size(height, width):
    model = create_model("deit_base_distilled", depth=1)
    images = jax.ShapeDtypeStruct((3, height, width, 3), jnp.float32)
    (level,) = jax.eval_shape(functools.partial(model.apply, method="features"), shapes_of(model), images)
    assert level.x.shape == (3, height // 16, width // 16, 768)
    assert jax.eval_shape(model.apply, shapes_of(model), images).shape == (3, 1000)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size", [(192, 256), (100, 167), (448, 448), (16, 47)])
def test_any_size_equals_a_table_resized_by_hand(size, distilled):
    model, images, extra = little(image_size=(224, 160), distilled=distilled), random_images(1, *size), 1 + distilled
    params = random_variables(model)["params"]
    table = params["pos_embed"][0, extra:].reshape(14, 10, -1)
    rows, columns = (cubic_matrix(a, side // 16) for a, side in zip((14, 10), size, strict=True))
    table = np.einsum("ph,qw,hwc->pqc", rows, columns, table).reshape(1, -1, 24)
    table = np.concatenate([params["pos_embed"][:, :extra], table], axis=1).astype(np.float32)
    logits = apply(model, {"params": params}, images)
    expected = apply(model.clone(image_size=size), {"params": {**params, "pos_embed": table}}, images)
    assert golden.relative_error(logits, expected) < 1e-5


def test_rows_and_columns_beyond_a_patch_are_dropped():
    model, images = little(), random_images(2, 71, 79)
    variables = random_variables(model)
    logits = apply(model, variables, images)
    np.testing.assert_allclose(logits, apply(model, variables, images[:, :64, :64]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, shape", [("deit_tiny", (1, 15, 64, 3)), ("deit_micro", (1, 3, 9, 3)), ("deit_base", (64, 64, 3))]
)
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
    assert [str(program.jaxpr).count("remat") for program in traced] == [0, 3]
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
    (level,) = jax.eval_shape(functools.partial(half.apply, method="features"), variables, images)
    assert level.x.dtype == jnp.dtype("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype("float32")}


def test_bfloat16_is_finite_at_a_thousand_times_the_scale():
    model, images = little(dtype=jnp.bfloat16), 1000 * random_images(4, 64, 64)
    variables = random_variables(model)
    for key in ("pos_embed", "cls_token"):
        variables["params"][key] = 1000 * variables["params"][key]

    def loss(variables):
        logits, state = model.apply(variables, images, train=True, capture_intermediates=True)
        residual = [state["intermediates"][f"blocks_{j}"]["__call__"][0] for j in range(3)]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean(), (logits, residual)

    (value, (logits, residual)), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert logits.dtype == value.dtype == jnp.float32
    assert min(np.std(np.float32(x)) for x in residual) > 100
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, logits, grads)))


def test_attention_maps_are_sown():
    model, images = little(distilled=True), random_images(2, 64, 48)
    _, state = quick_jit(functools.partial(model.apply, mutable="intermediates"))(random_variables(model), images)
    for j in range(3):
        (weights,) = state["intermediates"][f"blocks_{j}"]["attn"]["attention"]
        assert weights.shape == (2, 3, 14, 14)
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


def test_drop_path_grows_from_zero_to_the_rate():
    model = little(drop_path_rate=0.4)
    rates = [0, 0.2, 0.4]
    assert [block.drop_path for block in modules_called(Block, model, train=True)] == pytest.approx(rates)
    assert [branch.rate for branch in modules_called(DropPath, model, train=True)] == pytest.approx(np.repeat(rates, 2))
    assert [branch.rate for branch in modules_called(DropPath, model, train=False)] == [0] * 6


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


def test_decay_spares_vectors_tokens_and_positions():
    """But not the distillation token, which DeiT's own class forgets to exempt."""
    model = little(distilled=True)
    mask = traverse_util.flatten_dict(decay_mask(shapes_of(model)["params"], model.no_weight_decay), sep="/")
    assert {path for path, decayed in mask.items() if decayed != path.endswith("kernel")} == {"dist_token"}
    assert set(model.no_weight_decay) <= mask.keys()


def test_initialisation():
    """Official code: Linear, tables and tokens normal .02 with zero biases; the convolution as PyTorch makes it."""
    model = create_model("deit_tiny_distilled", depth=2)
    variables = quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    bound = (16 * 16 * 3) ** -0.5
    for path, x in params.items():
        spread = bound / 3**0.5 if path.startswith("patch_embed/proj/") else 0.02
        if path.endswith("scale"):
            assert np.all(x == 1), path
        elif path.endswith("bias") and not path.startswith("patch_embed"):
            assert np.all(x == 0), path
        else:
            assert np.std(x) == pytest.approx(spread, rel=6 / np.sqrt(2 * x.size)), path
            assert abs(np.mean(x)) < 6 * spread / np.sqrt(x.size), path
    assert all(np.max(np.abs(params[f"patch_embed/proj/{leaf}"])) <= bound for leaf in ("kernel", "bias"))
    assert sorted(path for path in params if "/" not in path) == ["cls_token", "dist_token", "pos_embed"]


def test_micro_is_for_small_images():
    model, variant = create_model("deit_micro"), get_variant("deit_micro")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == variant.params == 1_358_986
    assert jax.eval_shape(model.apply, variables, jnp.zeros((3, 32, 32, 3))).shape == (3, 10)
    assert variant.gmacs is None and variant.top1 is None
