"""Sums that are written twice: both forms, by value and gradient, and which of them is compiled where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from vitpyramid.models import forms, mlp_forms, token_forms


def residual_mlp(form, x, *parameters):
    """In three turns; drop path drops the branch of every fourth image."""
    divisor = jnp.where(jnp.arange(len(x)) % 4 == 1, jnp.inf, 0.9).astype(x.dtype)[:, None, None]
    return form(x, divisor, *parameters, epsilon=1e-6, turns=3)


# Name: the form of a TPU, that of other devices, their other arguments, and shapes of inputs.
CASES = (
    {
        f"pool {shape} x {times}": (
            forms.widening_convolution_tpu,
            forms.widening_products,
            (shape, (3, 3, 1, times * shape[-1]), (times * shape[-1],)),
        )
        for shape, times in [((2, 9, 6, 4), 2), ((1, 1, 2, 3), 2), ((2, 8, 7, 5), 3)]
    }
    | {
        "product": (
            lambda x, kernel, dtype: jnp.dot(x, kernel),
            lambda x, kernel, dtype: forms.product_of_rows(x, kernel),
            ((2, 5, 3), (3, 7)),
        )
    }
    | {
        "convolution": (
            lambda x, kernel, dtype: forms.convolve(x, kernel, (2, 1), ((1, 2), (0, 1))),
            lambda x, kernel, dtype: forms.convolution_of_places(
                x, kernel, window_strides=(2, 1), padding=((1, 2), (0, 1))
            ),
            ((2, 6, 5, 3), (3, 2, 3, 4)),
        )
    }
    | {
        "depthwise": (
            forms.depthwise_convolution_tpu,
            forms.shifted_products,
            ((2, 5, 7, 3), (3, 3, 1, 3), (3,)),
        )
    }
    | {
        f"reduction {shape} / {sr}": (
            forms.reducing_convolution_tpu,
            forms.reducing_products,
            (shape, (sr + 1, sr + 1, 1, shape[-1]), (shape[-1],)),
        )
        for shape, sr in [((2, 9, 17, 4), 8), ((1, 3, 8, 3), 4), ((2, 7, 6, 5), 2)]
    }
    | {
        f"patches {shape} / {patch}": (
            forms.patch_convolution_tpu,
            forms.patch_matrix_product,
            (shape, (patch, patch, shape[-1], 7), (7,)),
        )
        for shape, patch in [((2, 9, 8, 3), 4), ((1, 4, 7, 5), 2)]
    }
    | {
        f"overlapping patches {shape} / {patch}": (
            lambda x, kernel, dtype, stride=stride: forms.convolve(x, kernel, (stride, stride), "VALID"),
            lambda x, kernel, dtype, stride=stride: forms.product_of_cells(x, kernel, stride),
            (shape, (patch, patch, shape[-1], 5)),
        )
        for shape, patch, stride in [((2, 11, 8, 3), 4, 2), ((1, 9, 10, 2), 6, 2)]
    }
    | {
        f"norm {shape}": (
            functools.partial(token_forms.layer_norm_one_pass, epsilon=1e-6),
            functools.partial(token_forms.layer_norm_two_passes, epsilon=1e-6),
            (shape, shape[-1:], shape[-1:]),
        )
        for shape in [(2, 5, 33), (1, 3, 2, 8)]
    }
    | {
        "patches by rows": (
            forms.patch_rows_tpu,
            forms.patch_matrix_product,
            ((2, 13, 11, 3), (5, 5, 3, 7), (7,)),
        )
    }
    | {
        "mlp in turns": (
            lambda *inputs, dtype: residual_mlp(mlp_forms.residual_mlp_in_turns, *inputs),
            lambda *inputs, dtype: residual_mlp(mlp_forms.residual_mlp_at_once, *inputs),
            ((6, 5, 8), (8,), (8,), (8, 24), (24,), (24, 8), (8,)),
        )
    }
    | {
        "random features": (
            lambda *inputs, dtype: token_forms.random_features_by_parts(*inputs).astype(dtype),
            lambda *inputs, dtype: token_forms.random_features_product(*inputs).astype(dtype),
            ((2, 5, 8), (3, 8)),
        )
    }
    | {
        "gelu": (
            lambda x, dtype: token_forms.gelu_with_slope(x),
            lambda x, dtype: token_forms.gelu_erf(x),
            ((3, 5, 7),),
        )
    }
    | {
        f"attention {query} of {keys}": (
            lambda *inputs, dtype: token_forms.attention_tpu(*inputs, scale=0.7),
            lambda *inputs, dtype: token_forms.attention_in_pieces(*inputs, 0.7, entries=80),
            (query, keys, keys),
        )
        for query, keys in [((2, 7, 3, 4), (2, 5, 3, 4)), ((1, 2, 1, 8), (1, 9, 1, 8))]
    }
)


def value_and_gradients(form, inputs, dtype) -> list:
    """A form's values in `dtype`, and the gradients of their inner product with something."""
    form = functools.partial(form, dtype=jnp.dtype(dtype))

    def both(*inputs):
        out, backward = jax.vjp(form, *inputs)
        leaves, treedef = jax.tree.flatten(out)
        waves = [jnp.cos(jnp.arange(leaf.size) + i).reshape(leaf.shape) for i, leaf in enumerate(leaves)]
        return out, backward(treedef.unflatten([wave.astype(dtype) for wave in waves]))

    return jax.tree.leaves(jax.jit(both)(*(jnp.asarray(x, dtype) for x in inputs)))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("name", CASES)
def test_forms_are_equal(name, dtype, tolerance):
    tpu, default, shapes = CASES[name]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in shapes]
    with jax.enable_x64(dtype == "float64"):
        got, expected = (value_and_gradients(form, inputs, dtype) for form in (tpu, default))
    assert len(got) > len(shapes)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype == dtype
        assert golden.relative_error(left, right) < tolerance


@pytest.mark.parametrize("platform", ["tpu", "cpu", "cuda"])
def test_the_form_follows_from_the_device(platform):
    """Also through recomputation, a loop and a mapped axis; the other form is not in the program."""

    def loss(x, kernel, bias):
        turn = jax.checkpoint(lambda x, _: (x + forms.widening_convolution(x, kernel, bias, x.dtype).sum(), None))
        return jax.lax.scan(turn, x, length=3)[0].sum()

    shapes = [(4, 1, 5, 6, 2), (4, 3, 3, 1, 4), (4, 4)]
    function = jax.jit(jax.vmap(jax.grad(loss)))
    traced = function.trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [word in text for word in ("stablehlo.convolution", "stablehlo.pad")] == (
        [True, False] if platform == "tpu" else [False, True]
    )


@pytest.mark.parametrize("platform, barriers", [("tpu", 0), ("cpu", 2), ("cuda", 0)])
def test_a_cpu_writes_a_sum_and_its_cotangent(platform, barriers):
    traced = jax.jit(jax.grad(lambda x: jnp.square(forms.written(x)).sum())).trace(jnp.ones(3))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == barriers


@pytest.mark.parametrize("level", [0.0, 30.0, 300.0])
def test_a_row_far_from_zero_is_normed_in_one_pass(level):
    """Against float64: beside what rounding the row to bfloat16 costs, a variance by sums of squares costs nothing."""
    rng = np.random.default_rng(0)
    x = level + rng.standard_normal((4, 7, 48))
    parameters = 1 + 0.1 * rng.standard_normal(48), rng.standard_normal(48)
    with jax.enable_x64(True):
        exact = token_forms.layer_norm_two_passes(x, *parameters, epsilon=1e-6, dtype=jnp.float64)
    x, *parameters = jnp.asarray(x, jnp.bfloat16), *map(np.float32, parameters)
    one, two = (
        golden.relative_error(form(x, *parameters, epsilon=1e-6, dtype=jnp.float32), exact)
        for form in (token_forms.layer_norm_one_pass, token_forms.layer_norm_two_passes)
    )
    assert one < 1.02 * two < 0.5


def test_random_features_keep_the_digits_of_float32():
    """Of a bfloat16 input, by three products of bfloat16; one alone has an error of 1e-3."""
    rng = np.random.default_rng(0)
    u, w = jnp.asarray(rng.standard_normal((2, 9, 64)), jnp.bfloat16), np.float32(rng.standard_normal((32, 64)))
    with jax.enable_x64(True):
        exact = token_forms.random_features_product(np.float64(u), np.float64(w))
    assert golden.relative_error(jax.jit(token_forms.random_features_by_parts)(u, w), exact) < 1e-6


def test_gelu_with_its_slope_loses_no_more():
    """In bfloat16 against float64, value and slope: the errors of erfc are larger by an eighth and a quarter."""
    x = jnp.linspace(-8, 8, 4001).astype(jnp.bfloat16)

    def both(form, x):
        out, backward = jax.vjp(form, x)
        return [np.float64(array) for array in (out, *backward(jnp.ones_like(out)))]

    with jax.enable_x64(True):
        exact = both(token_forms.gelu_erf, x.astype(jnp.float64))
    jax_gelu = functools.partial(jax.nn.gelu, approximate=False)
    found = zip(*(both(form, x) for form in (token_forms.gelu_with_slope, jax_gelu)), exact, strict=True)
    for ours, erfc, exact in found:
        assert np.linalg.norm(ours - exact) < 0.95 * np.linalg.norm(erfc - exact)


def test_large_logits_stay_finite():
    """Of 1e4: only their differences are raised to a power; what is far below the largest has no weight."""
    query, key = (jnp.full((1, 2, 1, 1), 100.0).at[0, 1].set(-100.0) for _ in range(2))
    value = jnp.arange(2.0).reshape(1, 2, 1, 1)
    out, backward = jax.vjp(lambda *inputs: token_forms.attention_tpu(*inputs, scale=1.0), query, key, value)
    np.testing.assert_array_equal(out, value)
    assert all(jnp.isfinite(gradient).all() for gradient in backward(out))


@pytest.mark.parametrize("level", [0.0, 2.5])
def test_a_nearly_flat_window_loses_no_more_in_one_convolution(level):
    """Against float64: the variance of windows of one or two neighbouring bfloat16 values, far from 0 and at 0."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(level + 0.01 * rng.standard_normal((1, 21, 21, 3)), jnp.bfloat16)
    parameters = [1 + 0.1 * rng.standard_normal(147), *(rng.standard_normal(s) for s in [(147,), (147, 16), (16,)])]
    options = {"split": (7, 4, 2)}
    with jax.enable_x64(True):
        exact = forms.split_norm_product(np.float64(x), *parameters, dtype=jnp.float64, **options)
    parameters = [np.float32(parameter) for parameter in parameters]
    one, windows = (
        golden.relative_error(form(x, *parameters, dtype=jnp.bfloat16, **options), exact)
        for form in (forms.split_norm_convolution_tpu, forms.split_norm_product)
    )
    assert one < 2 * windows < 0.04


@pytest.mark.parametrize("dtype, convolves", [("bfloat16", True), ("float32", False)])
def test_float32_windows_are_normed_one_by_one(dtype, convolves):
    split = jax.jit(functools.partial(forms.split_norm_linear, split=(3, 2, 1), dtype=jnp.dtype(dtype)))
    shapes = [(1, 8, 8, 4), (36,), (36,), (36, 5), (5,)]
    traced = split.trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert ("stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()) == convolves
