"""PiT against results of the official code, and properties of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from harness import assert_within, golden_run
from vitpyramid.models.pit import PoolConv, Transformer
from vitpyramid.models.registry import create_model

GOLDENS = [
    ("pit_ti_224x224", "float64"),
    ("pit_ti_224x224_small", "float64"),
    ("pit_ti_distilled_224x224", "float64"),
]


def taps(model, variables, images):
    logits, state = model.apply(
        variables,
        images,
        mutable="intermediates",
        capture_intermediates=lambda module, _: isinstance(module, Transformer) or module.name == "norm",
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
            return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(function(params, x) ** 3), argnums=(0, 1)))

        expected = loss(convolve)(params, x)
        got = loss(lambda params, x: pool.apply({"params": params}, x))(params, x)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, expected)


def test_initialisation():
    """Official code: tables and class tokens normal .02, norms 1 and 0, everything else as PyTorch makes it."""
    model = create_model("pit_ti_distilled", depths=(1, 1, 1))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
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
