"""ResT's sums that are written twice: both forms, by value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from vitpyramid.models import rest_forms
from vitpyramid.models.rest_forms import Cells


def value_and_gradients(form, inputs) -> list[np.ndarray]:
    """Of the inner product of a form's values with something."""

    def both(inputs):
        out, backward = jax.vjp(form, *inputs)
        waves = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), out)
        return out, backward(waves)

    return jax.tree.leaves(jax.jit(both)(inputs))


def errors(left, right) -> list[float]:
    return [golden.relative_error(*pair) for pair in zip(left, right, strict=True)]


def stem_inputs(shape, dtype):
    """An image, kernels and norms."""
    rng = np.random.default_rng(0)
    kernels = tuple(rng.standard_normal((3, 3, *channels)) for channels in [(3, 4), (4, 4), (4, 6)])
    norms = tuple(tuple(rng.standard_normal((4, 4))) for _ in range(2))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (rng.standard_normal(shape), kernels, norms))


@pytest.mark.parametrize("shape", [(2, 8, 12, 3), (1, 9, 7, 3), (2, 5, 4, 3)])
@pytest.mark.parametrize("one_pass", [False, True])
def test_stems_are_equal(shape, one_pass):
    """Also by statistics in one pass, whose sums leave out what cells have beyond the map."""
    folded, plain = STEMS
    with jax.enable_x64(True):
        forms = (
            functools.partial(form, of_batch=True, dtype=jnp.float64)
            for form in (functools.partial(folded, one_pass=one_pass), plain)
        )
        found = errors(*(value_and_gradients(form, stem_inputs(shape, "float64")) for form in forms))
    assert max(found) < 1e-12  # the running statistics have no gradient: 0 of both


STEMS = (rest_forms.stem_tpu, rest_forms.stem_plain)


def test_a_stem_in_bfloat16_is_as_close_to_float64():
    """Images far from the mean of 0 that the running statistics start with."""
    image, *parameters = stem_inputs((4, 32, 32, 3), "bfloat16")
    image = image + 2
    parameters = jax.tree.map(jnp.float32, parameters)
    inputs = image, *parameters
    with jax.enable_x64(True):
        form = functools.partial(rest_forms.stem_plain, of_batch=True, dtype=jnp.float64)
        exact = jax.jit(form)(*jax.tree.map(jnp.float64, inputs))
    outs = [jax.jit(functools.partial(form, of_batch=True, dtype=jnp.bfloat16))(*inputs) for form in STEMS]
    assert outs[0][0].dtype == jnp.bfloat16 and outs[0][1][0][1].dtype == jnp.float32
    folded, plain = (errors(*map(jax.tree.leaves, (out, exact))) for out in outs)
    assert all(left < max(1.5 * right, 1e-3) < 0.02 for left, right in zip(folded, plain, strict=True))


def test_one_pass_over_folded_channels_is_batch_norm():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = 3 + rng.standard_normal((2, 4, 6, 5))
        parameters = [jnp.asarray(row) for row in rng.standard_normal((4, 5))]
        pairs, single = ((Cells(4), Cells(6, fold)) for fold in (2, 1))
        folded = lambda x, *rest: rest_forms.batch_norm(x.reshape(2, 4, 3, 10), *rest, True, True, pairs)  # noqa: E731
        plain = lambda x, *rest: rest_forms.batch_norm(x, *rest, True, False, single)  # noqa: E731
        got, expected = (
            value_and_gradients(form, (x, *parameters[:2]))
            for form in (
                lambda *inputs: folded(*inputs, *parameters[2:]),
                lambda *inputs: plain(*inputs, *parameters[2:]),
            )
        )
        assert max(errors((leaf.ravel() for leaf in got[1:]), (leaf.ravel() for leaf in expected[1:]))) < 1e-12


@pytest.mark.parametrize("shape, keys", [((2, 6, 3, 5), 4), ((1, 1, 2, 3), 3)])
def test_mixed_attentions_are_equal(shape, keys):
    b, _, heads, d = shape
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s) for s in (shape, (b, keys, heads, d), (b, keys, heads, d), (heads, heads))]
    bias = rng.standard_normal(heads)  # its gradient is 0, which no digits are left of
    with jax.enable_x64(True):
        got, expected = (
            value_and_gradients(lambda *inputs, form=form: form(*inputs, jnp.asarray(bias)), inputs) for form in MIXED
        )
    assert max(errors(got, expected)) < 1e-12


MIXED = (rest_forms.mixed_attention_tpu, rest_forms.mixed_attention_plain)


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_mixed_attention_in_bfloat16_is_as_close_to_float64(size):
    """Also of nearly flat maps, where what is left without the mean is small."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal((2, n, 3, 32)), jnp.bfloat16) for n in (50, 49, 49)]
    inputs += [np.float32(size * rng.standard_normal((3, 3))), np.float32(rng.standard_normal(3))]
    with jax.enable_x64(True):
        exact = jax.jit(rest_forms.mixed_attention_plain)(*(jnp.float64(x) for x in inputs))
    tpu, plain = (golden.relative_error(jax.jit(form)(*inputs), exact) for form in MIXED)
    assert tpu < 1.5 * plain < 0.03
