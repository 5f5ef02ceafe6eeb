"""PVT against results of the official code, and properties of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
from harness import apply, linear_matrix
from vitpyramid.models.layers import DropPath, resize_positions
from vitpyramid.models.registry import create_model
from vitpyramid.weights import flax_to_torch, torch_to_flax

GOLDENS = [
    *((f"pvt_{case}", "float64") for case in ("tiny_224x224", "tiny_224x224_small", "tiny_200x232", "small_192x256")),
    ("pvt_tiny_224x224", "float32"),
]


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
        rows, columns = (linear_matrix(a, b) for a, b in zip(old, new, strict=True))
        subscripts = "ph,qw,pqc->hwc" if transpose else "ph,qw,hwc->pqc"
        table = table.reshape(*(new if transpose else old), -1)
        return np.einsum(subscripts, rows, columns, table, optimize=True).reshape(-1, table.shape[-1])

    return map_tables(params, stages, resize)


@functools.partial(jax.jit, static_argnums=0)
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


def test_resized_table_equals_the_rule():
    table = np.random.default_rng(0).standard_normal((1, 7 * 9, 3)).astype(np.float32)
    for new in [(7, 9), (14, 18), (3, 20), (5, 4), (1, 1)]:
        expected = np.einsum(
            "ph,qw,hwc->pqc", linear_matrix(7, new[0]), linear_matrix(9, new[1]), table.reshape(7, 9, 3)
        )
        got = resize_positions(table, (7, 9), new, "bilinear")
        np.testing.assert_allclose(got, expected.reshape(1, -1, 3), atol=1e-6)


def test_drop_path_drops_whole_samples():
    kept = DropPath(0.25).apply({}, jnp.ones((4000, 3, 2)), rngs={"dropout": jax.random.key(0)})
    per_sample = kept[:, 0, 0]
    np.testing.assert_array_equal(kept, jnp.broadcast_to(per_sample[:, None, None], kept.shape))
    np.testing.assert_allclose(np.unique(per_sample), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(per_sample > 0) == pytest.approx(0.75, abs=0.03)


def test_initialisation():
    """Official `_init_weights`: Linear, tables and class token normal .02; convolutions as PyTorch makes them."""
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(create_model("pvt_tiny").init)(jax.random.key(0), images)
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
