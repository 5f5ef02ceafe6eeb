"""DeiT against results of timm's, and properties of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
from harness import assert_within, golden_run
from vitpyramid.models.registry import create_model
from vitpyramid.weights import torch_to_flax

GOLDENS = [
    ("deit_tiny_224x224", "float64"),
    ("deit_tiny_224x224_small", "float64"),
    ("deit_tiny_distilled_224x224", "float64"),
    ("deit_tiny_distilled_224x224", "float32"),
]


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


def test_position_tables_that_fit_no_image_are_refused():
    weights = {key: np.zeros(shape, np.int8) for key, shape in golden.manifest()["deit_tiny"]["state_dict"].items()}
    for rows in (0, 1, 200):
        with pytest.raises(ValueError, match="pos_embed"):
            torch_to_flax("deit_tiny", {**weights, "pos_embed": np.zeros((1, rows, 192))})


def test_initialisation():
    """Official code: Linear, tables and tokens normal .02 with zero biases; the convolution as PyTorch makes it."""
    model = create_model("deit_tiny_distilled", depth=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
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
