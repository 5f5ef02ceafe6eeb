"""Named networks of T2T-ViT that have no golden file."""

import jax
import numpy as np
import pytest

import golden
import t2t_by_hand
from harness import shapes_of
from vitpyramid.models.registry import create_model
from vitpyramid.weights import flax_to_torch, torch_to_flax


def test_convolution_variant_has_the_official_names():
    """Those of `T2T_module` with `tokens_type="convolution"`; the backbone is that of `t2t_vit_14`."""
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of(create_model("t2t_vit_c_14")))
    shapes = {key: array.shape for key, array in flax_to_torch("t2t_vit_c_14", variables).items()}
    tokens = {key: shape for key, shape in shapes.items() if key.startswith("tokens_to_token.")}
    assert tokens == {
        "tokens_to_token.soft_split0.weight": (64, 3, 7, 7),
        "tokens_to_token.soft_split0.bias": (64,),
        "tokens_to_token.soft_split1.weight": (64, 64, 3, 3),
        "tokens_to_token.soft_split1.bias": (64,),
        "tokens_to_token.project.weight": (384, 64, 3, 3),
        "tokens_to_token.project.bias": (384,),
    }
    others = {key: list(shape) for key, shape in shapes.items() if key not in tokens}
    official = golden.manifest()["t2t_vit_14"]["state_dict"]
    assert others == {key: shape for key, shape in official.items() if not key.startswith("tokens_to_token.")}


@pytest.mark.parametrize("name, heads", [("t2t_vit_14_wide", 12), ("t2t_vit_dense", 8)])
def test_variants_equal_numpy(name, heads):
    """Through the converter, at the variants' own depths; the width of `t2t_vit_dense` grows."""
    model, images = create_model(name), np.random.default_rng(0).standard_normal((1, 32, 48, 3)).astype(np.float32)
    shapes = golden.manifest()[name]["state_dict"]
    weights = {key: golden.weight(key, tuple(shape), 0, "standard") for key, shape in shapes.items()}
    apply = jax.jit(model.apply)
    logits = apply(torch_to_flax(name, weights), images)
    assert golden.relative_error(logits, t2t_by_hand.logits(weights, images, heads)) < 1e-5
