"""Models by name."""

import re

import jax
import jax.numpy as jnp
import pytest

import golden
from vitpyramid import create_model
from vitpyramid.models.registry import list_models

OURS = {"regnety_micro", "pvt_micro", "pit_micro", "t2t_vit_micro", "rest_micro", "deit_micro"}


def test_every_published_network_is_there():
    """Those of the golden manifest, the convolution token module of T2T-ViT's Table 7, and the micro networks."""
    assert set(list_models()) == set(golden.manifest()) | {"t2t_vit_c_14", "regnety_160"} | OURS
    assert list_models("pit_b") == ["pit_b", "pit_b_distilled"]


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="unknown model 'pvt_smal'.*pvt_small"):
        create_model("pvt_smal")
    with pytest.raises(TypeError, match="pvt_tiny has no option 'patch'.*num_classes"):
        create_model("pvt_tiny", patch=4)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_classes", "10", "an integer of at least 1"),
        ("num_classes", 0, "an integer of at least 1"),
        ("num_classes", True, "an integer"),
        ("drop_path_rate", 1.5, "less than 1"),
        ("drop_rate", float("nan"), "less than 1"),
        ("image_size", (224, 224, 3), "(height, width)"),
        ("image_size", 224.0, "a side in pixels"),
        ("dtype", jnp.uint8, "a floating type"),
        ("dtype", None, "a floating type"),
        ("remat", "no", "True or False"),
    ],
)
def test_options_with_impossible_values(option, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{option} = {value!r}: expected ") + ".*" + re.escape(expected)):
        create_model("pvt_micro", **{option: value})


@pytest.mark.parametrize("name", sorted(OURS))
def test_images_are_checked_at_the_door(name):
    model, key = create_model(name), jax.random.key(0)
    for shape in ((2, 32, 32, 1), (2, 32, 32, 4), (2, 3, 32, 32), (32, 32, 3)):
        with pytest.raises(ValueError, match=re.escape(f"images have shape {shape}, expected [B, H, W, 3]")):
            jax.eval_shape(model.init, key, jnp.zeros(shape))
    with pytest.raises(ValueError, match="images are uint8, expected normalised floats"):
        jax.eval_shape(model.init, key, jnp.zeros((2, 32, 32, 3), jnp.uint8))
