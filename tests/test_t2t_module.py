"""Parts of T2T-ViT's tokens-to-token module: soft split, performer attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import t2t_by_hand
from vitpyramid.models.forms import soft_split, split_order
from vitpyramid.models.t2t_module import orthogonal_features, performer_attention, token_grid


def test_soft_split_is_unfold_with_the_entries_in_another_order():
    x = np.random.default_rng(0).standard_normal((1, 13, 18, 2)).astype(np.float32)
    for split in [(7, 4, 2), (3, 2, 1)]:
        unfolded = t2t_by_hand.unfold(x[0].transpose(2, 0, 1), *split)
        reordered = np.moveaxis(split_order(np.moveaxis(unfolded, -1, 0), split[0]), 0, -1)
        np.testing.assert_array_equal(soft_split(x, *split)[0], reordered)


def test_token_grid():
    sides = range(3, 500)
    by_formula = [(-(-(side - 2) // 16), -(-(side + 7) // 16)) for side in sides]
    assert [token_grid(side, side + 9) for side in sides] == by_formula


def performer_inputs(scale: float, w_norm: float = 32**0.5):
    rng = np.random.default_rng(0)
    query, key, value = (scale * rng.standard_normal((2, 20, 64)) for _ in range(3))
    w = np.linalg.qr(rng.standard_normal((64, 64)))[0][:32] * w_norm
    return query, key, value, w


def performer_without_shifts(query, key, value, w, guard=1e-8):
    """The official formula; batched, for jax."""
    phi_query, phi_key = (jnp.exp(u @ w.T - (u**2).sum(-1, keepdims=True) / 2) / len(w) ** 0.5 for u in (query, key))
    return phi_query @ (phi_key.mT @ value) / (phi_query @ phi_key.sum(1)[..., None] + guard)


def performer_without_guard(query, key, value, w):
    return performer_without_shifts(query, key, value, w, guard=0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function, query, key, value, w):
    """`[value, *gradients of the sum of its sines]`."""
    gradient = jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs, w))), (0, 1, 2))
    return function(query, key, value, w), *gradient(query, key, value)


@pytest.mark.parametrize("scale, guard_counts", [(0.01, False), (0.3, False), (0.7, True), (0.8, True), (1.5, True)])
def test_performer_equals_the_formula_without_shifts(scale, guard_counts):
    """In float64 the formula as it is does not overflow. At 0.7 the guard is part of the sum, at 1.5 the whole."""
    inputs = performer_inputs(scale)
    with jax.enable_x64(True):
        expected = value_and_gradient(performer_without_shifts, *inputs)
        for left, right in zip(value_and_gradient(performer_attention, *inputs), expected, strict=True):
            assert golden.relative_error(left, right) < 1e-11
        no_guard = value_and_gradient(performer_without_guard, *inputs)
        assert (golden.relative_error(no_guard[0], expected[0]) > 0.05) == guard_counts
    single = value_and_gradient(performer_attention, *(np.float32(x) for x in inputs))
    for left, right in zip(single, expected, strict=True):
        assert golden.relative_error(left, right) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale, w_norm", [(1e3, 32**0.5), (1.0, 1e3), (3.0, 40.0)])
def test_performer_is_finite(dtype, scale, w_norm):
    """With a large `w` the exponents are large as well, and the exponentials as they are overflow."""
    inputs = [jnp.asarray(x, dtype) for x in performer_inputs(scale, w_norm)]
    out, *gradients = value_and_gradient(performer_attention, *inputs)
    assert out.dtype == jnp.float32
    assert np.abs(out).max() <= np.abs(np.float32(inputs[2])).max() * 1.01  # a mean of values, or less by the guard
    assert all(np.isfinite(np.float32(x)).all() for x in (out, *gradients))
    if w_norm > 32:
        assert np.abs(out).max() > 0.1
        assert not all(np.isfinite(x).all() for x in value_and_gradient(performer_without_shifts, *inputs))


def test_random_features_are_orthogonal_and_random():
    w = np.asarray(orthogonal_features(jax.random.key(0), (32, 64)))
    np.testing.assert_allclose(w @ w.T, 32 * np.eye(32), atol=1e-4)
    assert abs(w.mean()) < 6 * (32 / 64) ** 0.5 / np.sqrt(w.size)
