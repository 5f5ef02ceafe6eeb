"""PVT against results of the official code, and properties of the network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
from vitpyramid.models.layers import DropPath, resize_positions
from vitpyramid.models.pvt import PVT, Block
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.weights import flax_to_torch, torch_to_flax

VARIANTS = {"pvt_tiny": 13_229_288, "pvt_small": 24_485_864, "pvt_medium": 44_208_104, "pvt_large": 61_369_320}
GOLDENS = [
    *((f"pvt_{case}", "float64") for case in ("tiny_224x224", "tiny_224x224_small", "tiny_200x232", "small_192x256")),
    ("pvt_tiny_224x224", "float32"),
]

# Compiling is most of these tests' time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def little(**fields) -> PVT:
    """A PVT with two blocks in its third stage and one in the others, narrow enough to run anywhere."""
    fields = {"image_size": 64, "num_classes": 5, **fields}
    return PVT((1, 1, 2, 1), dims=(8, 16, 24, 32), heads=(1, 2, 3, 4), **fields)


@functools.partial(quick_jit, static_argnums=0, static_argnames=("train", "method"))
def apply(model, variables, images, seed=0, *, train=False, method=None):
    """`model.apply` in one program; dropout draws from `seed`."""
    return model.apply(variables, images, train=train, method=method, rngs={"dropout": jax.random.key(seed)})


def random_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def random_variables(model, seed=0):
    """Variables at unit scale, so that every part of the network moves the output."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.standard_normal(leaf.shape).astype(np.float32) * max(0.1, leaf.shape[0] ** -0.5)

    return jax.tree.map(draw, shapes)


def resize_matrix(rows: int, new_rows: int) -> np.ndarray:
    """`[new_rows, rows]`: PyTorch's bilinear `interpolate(align_corners=False)` along one axis."""
    matrix = np.zeros((new_rows, rows))
    for out in range(new_rows):
        source = max((out + 0.5) * rows / new_rows - 0.5, 0.0)
        low = int(source)
        high = min(low + 1, rows - 1)
        matrix[out, low] += 1 - (source - low)
        matrix[out, high] += source - low
    return matrix


def grids(height: int, width: int) -> list[tuple[int, int]]:
    """The four stages' grids of a PVT."""
    return [(height // stride, width // stride) for stride in (4, 8, 16, 32)]


def map_tables(params: dict, stages, function) -> dict:
    """`params` with `function(table [rows, C], stage)` in place of the position tables; the class slot is kept."""
    params = dict(params)
    for stage in stages:
        first = int(stage == 4)
        table = np.asarray(params[f"pos_embed{stage}"], np.float64)[0]
        params[f"pos_embed{stage}"] = np.concatenate([table[:first], function(table[first:], stage)])[None]
    return params


def resize_tables(params: dict, height: int, width: int, stages=(1, 2, 3, 4), native=224, transpose=False) -> dict:
    """Tables for `native` square images resized for `height x width`; `transpose` maps gradients back instead."""

    def resize(table, stage):
        old, new = grids(native, native)[stage - 1], grids(height, width)[stage - 1]
        rows, columns = (resize_matrix(a, b) for a, b in zip(old, new, strict=True))
        subscripts = "ph,qw,pqc->hwc" if transpose else "ph,qw,hwc->pqc"
        table = table.reshape(*(new if transpose else old), -1)
        return np.einsum(subscripts, rows, columns, table, optimize=True).reshape(-1, table.shape[-1])

    return map_tables(params, stages, resize)


@functools.partial(quick_jit, static_argnums=0)
def train_run(model, params, images, labels):
    """One program for everything the golden files hold: with all rates 0, training and evaluation are the same.

    Returns loss, logits, the four maps, the head's input and the gradients.
    """

    def loss_fn(params):
        logits, state = model.apply(
            {"params": params},
            images,
            train=True,
            capture_intermediates=lambda module, method: method == "encode" or module.name == "norm",
        )
        captured = state["intermediates"]
        (levels, _), pooled = captured["encode"][0], captured["norm"]["__call__"][0]
        loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))
        return loss, (logits, [level.x for level in levels], pooled)

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, *aux, grads


def tap_dict(maps, pooled):
    taps = {f"stage{i}": np.asarray(x).transpose(0, 3, 1, 2) for i, x in enumerate(maps, start=1)}
    return {**taps, "pooled": np.asarray(pooled)}


@functools.cache
def golden_run(stem: str, precision: str):
    """`(forward errors, train errors, gradients by PyTorch name)` of the model on one golden file."""
    reference = golden.read(stem)
    name, weights = reference.meta["variant"], reference.state_dict()
    with jax.enable_x64(precision == "float64"):
        model = create_model(name, dtype=jnp.dtype(precision))
        params = jax.tree.map(lambda x: jnp.asarray(x, precision), torch_to_flax(name, weights)["params"])
        images = jnp.asarray(reference.images(), precision)
        loss, logits, maps, pooled, grads = train_run(model, params, images, jnp.array(reference.meta["labels"]))
        assert logits.dtype == loss.dtype == jnp.dtype(precision)
        grads = flax_to_torch(name, {"params": grads})
    taps = tap_dict(maps, pooled)
    assert list(taps) == reference.meta["taps"]
    return reference.forward_errors(logits, taps), reference.train_errors(loss, grads, weights), grads


def assert_within(errors: dict, precision: str):
    tolerances = golden.TOLERANCES[precision]
    too_large = {key: error for key, error in errors.items() if not error < tolerances.get(key, tolerances["forward"])}
    assert not too_large


@pytest.mark.parametrize("stem, precision", GOLDENS)
def test_equals_official_code(stem, precision):
    forward, train, _ = golden_run(stem, precision)
    assert_within(forward | train, precision)


def test_gradient_reaches_every_parameter_but_key_biases():
    _, _, grads = golden_run("pvt_tiny_224x224", "float64")
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    key_biases = 0
    for name, grad in grads.items():
        if name.endswith(".kv.bias"):  # [key | value]; a constant added to all keys leaves the softmax as it is
            key, grad = np.split(grad, 2)
            key_biases += 1
            assert np.linalg.norm(key) < 1e-12 * total, name
        assert np.linalg.norm(grad) > 1e-6 * total, name
    assert key_biases == 8


def test_112x448_differs_from_official_code_in_the_first_table_alone():
    """At 112 x 448 stage 1 has 28 * 112 = 56 * 56 tokens and the official code takes its table unresized.

    Here it is resized, so the results differ. With that one table read as the official code reads it, and the others
    resized, they agree: the table of stage 1 is the whole difference.
    """
    reference = golden.read("pvt_tiny_112x448")
    weights = reference.state_dict()
    native = torch_to_flax("pvt_tiny", weights)["params"]
    images, labels = reference.images(), jnp.array(reference.meta["labels"])

    logits = apply(create_model("pvt_tiny"), {"params": native}, images)
    assert golden.relative_error(logits, reference.data["logits_f64"]) > 0.05

    with jax.enable_x64(True):
        as_double = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
        model = create_model("pvt_tiny", dtype=jnp.float64, image_size=(112, 448))
        params = as_double(resize_tables(native, 112, 448, stages=(2, 3, 4)))
        loss, logits, maps, pooled, grads = train_run(model, params, as_double(images), labels)
        grads = resize_tables(grads, 112, 448, stages=(2, 3, 4), transpose=True)
        assert_within(reference.forward_errors(logits, tap_dict(maps, pooled)), "float64")
        grads = flax_to_torch("pvt_tiny", {"params": grads})
        assert_within(reference.train_errors(loss, grads, weights), "float64")

        # Nor does anything else differ at this size: all four tables resized by hand equal the model's own resizing.
        params = as_double(resize_tables(native, 112, 448))
        _, by_hand, *_ = train_run(model, params, as_double(images), labels)
        own = jax.jit(create_model("pvt_tiny", dtype=jnp.float64).apply)(
            {"params": as_double(native)}, as_double(images)
        )
        assert golden.relative_error(own, by_hand) < 1e-12


@pytest.mark.parametrize("size", [(225, 225), (448, 448), (224, 896), (100, 167), (256, 832), (32, 47)])
def test_any_size_equals_tables_resized_by_hand(size):
    # 448 x 448 and 224 x 896 have 3136 tokens in stage 2, where the official code fails.
    model, images = little(image_size=224), random_images(1, *size)
    params = random_variables(model)["params"]
    by_hand = jax.tree.map(jnp.float32, resize_tables(params, *size))
    levels = apply(model, {"params": params}, images, method="features")
    expected = apply(little(image_size=size), {"params": by_hand}, images, method="features")
    assert [level.x.shape[1:3] for level in levels] == grids(*size)
    for level, right in zip(levels, expected, strict=True):
        assert golden.relative_error(level.x, right.x) < 1e-5


def test_rows_and_columns_beyond_a_patch_are_dropped():
    model, images = little(), random_images(2, 71, 95)
    variables = random_variables(model)
    logits, cropped = apply(model, variables, images), apply(model, variables, images[:, :68, :92])
    np.testing.assert_allclose(logits, cropped, rtol=1e-6)


def test_resized_table_equals_the_rule():
    table = np.random.default_rng(0).standard_normal((1, 7 * 9, 3)).astype(np.float32)
    for new in [(7, 9), (14, 18), (3, 20), (5, 4), (1, 1)]:
        expected = np.einsum(
            "ph,qw,hwc->pqc", resize_matrix(7, new[0]), resize_matrix(9, new[1]), table.reshape(7, 9, 3)
        )
        got = resize_positions(table, (7, 9), new, "bilinear")
        np.testing.assert_allclose(got, expected.reshape(1, -1, 3), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 31, 64, 3), (1, 64, 31, 3), (64, 64, 3)])
def test_images_too_small_or_without_batch_are_refused(shape):
    with pytest.raises(ValueError, match="at least 32"):
        jax.eval_shape(create_model("pvt_tiny").init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_official_code(name):
    entry = golden.manifest()[name]
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(create_model(name).init, jax.random.key(0), images)
    assert list(variables) == ["params"]
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in leaves) == VARIANTS[name] == entry["parameters"] == get_variant(name).params
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    torch = {key: list(array.shape) for key, array in flax_to_torch(name, zeros).items()}
    assert torch == entry["state_dict"]


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


@pytest.mark.parametrize("name", VARIANTS)
def test_multiply_accumulates_are_those_of_the_official_code(name):
    model, images = create_model(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    macs = matmul_macs(jax.make_jaxpr(model.apply)(variables, images).jaxpr)
    assert macs == golden.manifest()[name]["macs"]
    assert macs / 1e9 == pytest.approx(get_variant(name).gmacs, abs=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_features_have_their_strides_and_widths(name):
    model, images = create_model(name), jax.ShapeDtypeStruct((2, 192, 256, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    levels = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
    assert [level.stride for level in levels] == [4, 8, 16, 32]
    assert [level.x.shape for level in levels] == [(2, 48, 64, 64), (2, 24, 32, 128), (2, 12, 16, 320), (2, 6, 8, 512)]


def test_remat_changes_nothing_but_recomputes():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    rngs = {"dropout": jax.random.key(1)}

    def loss(variables, remat):
        model = little(remat=remat, attn_drop_rate=0.1, drop_path_rate=0.5)
        return jnp.sum(model.apply(variables, images, train=True, rngs=rngs) ** 2)

    traced = [quick_jit(jax.value_and_grad(loss), static_argnums=1).trace(variables, remat) for remat in (False, True)]
    assert ["remat" in str(program.jaxpr) for program in traced] == [False, True]
    plain, recomputed = (program.lower().compile()(variables) for program in traced)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, recomputed)


def test_bfloat16_is_close_and_its_logits_are_float32():
    variables, images = random_variables(little()), random_images(4, 64, 64)
    half = little(dtype=jnp.bfloat16)
    logits, half_logits = apply(little(), variables, images), apply(half, variables, images)
    assert half_logits.dtype == jnp.float32
    assert 1e-5 < golden.relative_error(half_logits, logits) < 0.05
    levels = jax.eval_shape(functools.partial(half.apply, method="features"), variables, images)
    assert {level.x.dtype for level in levels} == {jnp.dtype("bfloat16")}
    created = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}


def test_attention_maps_are_sown():
    model, images = little(), random_images(2, 64, 64)
    _, state = jax.jit(functools.partial(model.apply, mutable="intermediates"))(random_variables(model), images)
    maps = traverse_util.flatten_dict(state["intermediates"], sep="/")
    shapes = {
        "block1_0": (2, 1, 256, 4),
        "block2_0": (2, 2, 64, 4),
        "block3_1": (2, 3, 16, 4),
        "block4_0": (2, 4, 5, 5),
    }
    for block, shape in shapes.items():
        (weights,) = maps[f"{block}/attn/attention"]
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def calls_of(kind: type, model, train: bool) -> tuple[list, list]:
    """Modules of class `kind` in order of their calls, and the calls' outputs, for 16 images."""
    modules = []

    def run(variables, images):
        outputs = []

        def record(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if isinstance(context.module, kind) and context.method_name == "__call__":
                modules.append(context.module)
                outputs.append(output)
            return output

        with nn.intercept_methods(record):
            model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(0)})
        return outputs

    return modules, quick_jit(run)(random_variables(model), random_images(16, 32, 32))


def test_drop_path_grows_from_zero_to_the_rate_over_all_blocks():
    model = little(drop_path_rate=0.4)
    rates = [0, 0.1, 0.2, 0.3, 0.4]
    assert [block.drop_path for block in calls_of(Block, model, train=True)[0]] == pytest.approx(rates)
    assert [branch.rate for branch in calls_of(DropPath, model, train=True)[0]] == pytest.approx(np.repeat(rates, 2))
    assert [branch.rate for branch in calls_of(DropPath, model, train=False)[0]] == [0] * 10


def test_drop_path_drops_whole_samples():
    kept = DropPath(0.25).apply({}, jnp.ones((4000, 3, 2)), rngs={"dropout": jax.random.key(0)})
    per_sample = kept[:, 0, 0]
    np.testing.assert_array_equal(kept, jnp.broadcast_to(per_sample[:, None, None], kept.shape))
    np.testing.assert_allclose(np.unique(per_sample), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(per_sample > 0) == pytest.approx(0.75, abs=0.03)


def test_drop_path_draws_anew_for_each_branch():
    _, outputs = calls_of(DropPath, little(drop_path_rate=0.5), train=True)
    masks = [tuple(np.any(output, axis=(1, 2)).tolist()) for output in outputs]
    assert all(masks[0] + masks[1])  # the first block drops nothing
    assert len(set(masks[4:])) == len(masks[4:]) == 6


def test_dropout_acts_in_training_alone_and_only_at_a_rate():
    variables, images = random_variables(little()), random_images(2, 64, 64)
    logits = apply(little(), variables, images)
    np.testing.assert_array_equal(apply(little(), variables, images, train=True), logits)
    for rate in ("drop_rate", "attn_drop_rate"):
        model = little(**{rate: 0.3})
        np.testing.assert_array_equal(apply(model, variables, images), logits)
        trained = apply(model, variables, images, train=True)
        assert golden.relative_error(trained, logits) > 0.01
        np.testing.assert_array_equal(apply(model, variables, images, train=True), trained)
        assert golden.relative_error(apply(model, variables, images, 1, train=True), trained) > 0.01


def test_initialisation():
    """Official `_init_weights`: Linear, tables and class token normal .02; convolutions as PyTorch makes them."""
    images = jnp.zeros((1, 32, 32, 3))
    variables = quick_jit(create_model("pvt_tiny").init)(jax.random.key(0), images)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    fan_in = {path.rsplit("/", 1)[0]: x[..., 0].size for path, x in params.items() if x.ndim == 4}
    assert len(fan_in) == 4 + 6
    for path, x in params.items():
        module, leaf = path.rsplit("/", 1) if "/" in path else ("", path)
        error = 6 / np.sqrt(2 * x.size)  # six standard errors of a standard deviation
        if module in fan_in:
            bound = fan_in[module] ** -0.5
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=error), path
            assert np.max(np.abs(x)) <= bound, path
            assert abs(np.mean(x)) < 6 * bound / np.sqrt(3 * x.size), path
        elif leaf == "scale":
            assert np.all(x == 1), path
        elif leaf == "bias":
            assert np.all(x == 0), path
        else:
            assert np.std(x) == pytest.approx(0.02, rel=error), path
            assert abs(np.mean(x)) < 6 * 0.02 / np.sqrt(x.size), path
