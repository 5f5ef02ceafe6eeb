"""Deformable DETR against its authors' numbers, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden
from vitpyramid.heads import deformable_attention as attention
from vitpyramid.weights import names

EXACT = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("form", [attention.sample_by_gathers, attention.sample_by_products])
@pytest.mark.parametrize("stem", ["ms_deform_attn", "ms_deform_attn_ref4"])
def test_attention(stem, form, monkeypatch):
    """Also of cells that are padding; by matrix products in parts."""
    golden = DenseGolden(stem)
    meta, weights = golden.meta, golden.state_dict()
    monkeypatch.setattr(attention, "sample", form)
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", 5000)
    grids = tuple(map(tuple, meta["spatial_shapes"]))
    layer = attention.DeformableAttention(meta["heads"], len(grids), meta["points"], jnp.float64)
    query, value, cotangent = (
        jnp.asarray(golden.input(name), jnp.float64) for name in ("query", "input_flatten", "cotangent")
    )
    inside = ~golden.array("padding_mask") if "padding_mask/packed" in golden.data else None
    params = {}
    for name, array in weights.items():
        module, leaf = name.split(".")
        array = array.astype(np.float64)
        params.setdefault(module, {})[{"weight": "kernel"}.get(leaf, leaf)] = array.T

    @jax.jit
    def run(*inputs):
        def call(params, query, reference, value):
            return layer.apply({"params": params}, query, reference, value, grids, inside)

        out, backward = jax.vjp(call, *inputs)
        return out, backward(cotangent)

    out, (of_params, of_query, of_reference, of_value) = run(params, query, golden.array("reference_points"), value)
    assert golden.error("output", out) < EXACT
    assert golden.error("grad_query", of_query) < EXACT
    assert golden.error("grad_reference", of_reference) < EXACT
    assert golden.error("grad_input", of_value) < EXACT
    gradients = {
        f"{module}.{({'kernel': 'weight'}).get(leaf, leaf)}": np.asarray(array).T
        for module, leaves in of_params.items()
        for leaf, array in leaves.items()
    }
    errors = golden.gradient_errors(gradients, weights)
    assert max(errors.values()) < EXACT, errors
