"""T2T-ViT against results of the official code and against a forward pass in numpy, and properties of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
import t2t_by_hand
from harness import NARROW, apply, assert_within, golden_run, random_images, random_variables, shapes_of
from vitpyramid.models.registry import create_model
from vitpyramid.models.t2t_vit import GhostAttention, GhostMlp, sinusoid

GOLDENS = [
    ("t2t_vit_7_224x224", "float64", ()),
    ("t2t_vit_7_224x224", "float32", ()),
    ("t2t_vit_7_224x224_small", "float64", ()),
    ("t2t_vit_7_160x160_img_size160", "float64", (("image_size", 160),)),
    ("t2t_vit_7_224x224_qk_scale0.0625", "float64", (("qk_scale", 0.0625),)),
    ("t2t_vit_t_14_224x224", "float64", ()),
]
NO_DROPOUT = (("token_drop_rate", 0.0),)
KINDS = [kind for kind in NARROW if kind.startswith("t2t")]
LITTLE = NARROW["t2t"]


def taps(model, variables, images):
    """Logits, and what the golden files hold of the network's inside."""

    def run(module, images):
        ((level,), class_token) = module.encode(images, False)
        patches = level.x.reshape(len(images), -1, level.x.shape[-1])
        final = module.norm(jnp.concatenate([class_token[:, None], patches], axis=1))
        return module.head(final[:, 0]), final

    keep = {"capture_intermediates": lambda module, _: module.name == "tokens_to_token", "mutable": ["intermediates"]}
    (logits, final), state = model.apply(variables, images, method=run, **keep)
    tokens = state["intermediates"]["tokens_to_token"]["__call__"][0]
    return logits, {"tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1]), "final": final}


@pytest.mark.parametrize("stem, precision, overrides", GOLDENS)
def test_equals_official_code(stem, precision, overrides):
    forward, train, _ = golden_run(stem, precision, taps, NO_DROPOUT + overrides)
    assert_within(forward | train, precision)


@pytest.mark.parametrize("kind, qk_scale", [(kind, scale) for kind in KINDS for scale in (None, 0.7)])
def test_equals_numpy(kind, qk_scale):
    """Not square and not divisible by anything: grids follow the convolutions. `qk_scale` is the backbone's alone."""
    variables, images = random_variables(NARROW[kind]), random_images(2, 51, 76)
    expected = t2t_by_hand.logits(t2t_by_hand.torch_names(variables), images, 2, qk_scale)
    with jax.enable_x64(True):
        variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, images))
        logits = apply(NARROW[kind].clone(dtype=jnp.float64, qk_scale=qk_scale), variables, images)
    assert golden.relative_error(logits, expected) < 1e-9


@pytest.mark.parametrize("size", [(3, 3), (16, 16), (200, 232), (100, 167), (225, 225)])
def test_any_size_equals_numpy(size):
    model, images = LITTLE.clone(), random_images(1, *size)
    variables = random_variables(model)
    expected = t2t_by_hand.logits(t2t_by_hand.torch_names(variables), images, heads=2)
    assert golden.relative_error(apply(model, variables, images), expected) < 1e-4


def test_stored_positions_are_used_at_their_number_of_tokens_alone():
    model = LITTLE.clone(image_size=64)  # 16 tokens
    variables = random_variables(model)
    assert variables["constants"]["pos_embed"].shape == (1, 17, 32)
    other = {**variables, "constants": jax.tree.map(lambda x: 1 - x, variables["constants"])}
    other["constants"]["tokens_to_token"] = variables["constants"]["tokens_to_token"]
    for size, used in {(64, 64): True, (32, 128): True, (64, 80): False}.items():
        images = random_images(1, *size)
        difference = golden.relative_error(apply(model, other, images), apply(model, variables, images))
        assert (difference > 0.01) == used, size


def test_positions_are_a_sinusoid():
    table = sinusoid(197, 256)
    np.testing.assert_array_equal(table, golden.sinusoid(197, 256))
    assert table.dtype == np.float32
    variables = jax.jit(LITTLE.clone(image_size=48).init)(jax.random.key(0), random_images(1, 16, 16))
    np.testing.assert_array_equal(variables["constants"]["pos_embed"], golden.sinusoid(10, 32))


def test_unknown_tokens_type_is_refused():
    with pytest.raises(ValueError, match="'linformer', expected one of performer, transformer, convolution"):
        shapes_of(LITTLE.clone(tokens_type="linformer"))


def test_gradient_reaches_every_parameter():
    _, _, grads = golden_run("t2t_vit_7_224x224", "float64", taps, NO_DROPOUT)
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    assert all(np.linalg.norm(grad) > 1e-6 * total for grad in grads.values())


def test_initialisation():
    """Official `_init_weights`: Linear and class token normal .02; convolutions as PyTorch makes them."""
    images = jnp.zeros((1, 16, 16, 3))
    models = {
        "performer": {},
        "ghost": {"mlp_ratio": 3, "attention": GhostAttention, "mlp": GhostMlp},
        "convolution": {"tokens_type": "convolution"},
    }
    for kind, fields in models.items():
        variables = jax.jit(create_model("t2t_vit_micro", **fields).init)(jax.random.key(0), images)
        uniform = 0
        for path, x in traverse_util.flatten_dict(variables["params"], sep="/").items():
            module, leaf = path.rsplit("/", 1) if "/" in path else ("", path)
            kernel = variables["params"]
            for part in module.split("/") if module else ():
                kernel = kernel[part]
            kernel = kernel.get("kernel", x) if isinstance(kernel, dict) else x
            if kernel.ndim in (3, 4) and leaf in ("kernel", "bias"):
                uniform += 1
                bound = kernel[..., 0].size ** -0.5
                error = 6 / np.sqrt(2 * x.size)
                assert np.std(x) == pytest.approx(bound / 3**0.5, rel=error), path
                assert np.max(np.abs(x)) <= bound, path
            elif leaf == "scale":
                assert np.all(x == 1), path
            elif leaf == "bias":
                assert np.all(x == 0), path
            else:
                assert np.std(x) == pytest.approx(0.02, rel=6 / np.sqrt(2 * x.size)), path
                assert abs(np.mean(x)) < 6 * 0.02 / np.sqrt(x.size), path
        assert uniform == {"performer": 0, "ghost": 2 * 5, "convolution": 2 * 3}[kind]
        if kind == "performer":
            first, second = (variables["constants"]["tokens_to_token"][f"attention{i}"]["w"] for i in (1, 2))
            np.testing.assert_allclose(first @ first.T, 32 * np.eye(32), atol=1e-4)
            assert np.abs(first - second).max() > 0.1
