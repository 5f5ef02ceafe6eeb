"""Models by name."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

import golden
from vitpyramid import create_model, model_facts, register_model
from vitpyramid.models import registry
from vitpyramid.models.registry import list_models

OURS = {"regnety_micro", "pvt_micro", "pit_micro", "t2t_vit_micro", "rest_micro", "deit_micro"}


def test_every_published_network_is_there():
    """Those of the golden manifest, the convolution token module of T2T-ViT's Table 7, and the micro networks."""
    assert set(list_models()) == set(golden.manifest()) | {"t2t_vit_c_14", "regnety_160"} | OURS
    assert list_models("pit_b") == ["pit_b", "pit_b_distilled"]
    assert list_models("*_tiny") == ["pvt_tiny", "deit_tiny"]
    assert list_models("pvt_[ts]*") == ["pvt_tiny", "pvt_small"]


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="unknown model 'pvt_smal'.*pvt_small"):
        create_model("pvt_smal")
    for name, meant in (("PVT-Small", "pvt_small"), ("T2T-ViT-14", "t2t_vit_14"), ("rest Lite", "rest_lite")):
        with pytest.raises(ValueError, match=f"unknown model '{name}'; .* such as {meant}"):
            create_model(name)
    with pytest.raises(ValueError, match=r"no model is called 'PVT\*'; .* such as pvt_tiny, pvt_small, pvt_medium$"):
        list_models("PVT*")
    with pytest.raises(ValueError, match=r"no model is called '@\*'; expected one of list_models\(\)$"):
        list_models("@*")
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


def test_facts_can_be_written_as_json():
    facts = json.loads(json.dumps([model_facts(name) for name in list_models()]))
    assert [row["name"] for row in facts] == list_models()
    (dense,) = [row for row in facts if row["name"] == "t2t_vit_dense"]
    assert dense == {
        "name": "t2t_vit_dense", "family": "T2TViTDense", "parameters": 23_617_750, "gmacs": 5.5, "top1": 80.6,
        "num_classes": 1000, "image_size": 224, "strides": [16], "dims": [584], "crop": 0.9,
        "interpolation": "bicubic", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip


def test_facts_of_a_network_for_dense_prediction_are_its_backbones():
    facts = model_facts("semantic_fpn_pvt_tiny")
    own = {"name": "semantic_fpn_pvt_tiny", "family": "SemanticFPN", "backbone": "pvt_tiny", "num_classes": 150}
    assert facts == model_facts("pvt_tiny") | own | {"parameters": 16_981_398, "gmacs": 33.2, "top1": None}
    assert model_facts("semantic_fpn_pvt_micro")["num_classes"] == 11


def test_a_network_of_ones_own_has_a_name(monkeypatch):
    monkeypatch.setattr(registry, "VARIANTS", dict(registry.VARIANTS))
    model = create_model("deit_micro", depth=1, num_classes=3)
    register_model("deit_mine", model, like="t2t_vit_7")
    register_model("deit_mine", model)  # a cell that runs again
    assert create_model("deit_mine") == model and list_models("deit_mine") == ["deit_mine"]
    register_model("deit_mine_too", model, like="t2t_vit_7")
    facts = model_facts("deit_mine_too")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert (facts["crop"], facts["top1"], facts["gmacs"], facts["num_classes"]) == (0.9, None, None, 3)
    for name, other, error, message in (
        ("deit_mine", create_model("deit_micro"), ValueError, "another network has this name"),
        ("pvt_small", model, ValueError, "another network has this name"),
        ("Deit-Mine", model, ValueError, "small letters, digits and underscores"),
        ("mine", "deit_micro", TypeError, "expected a Backbone"),
    ):
        with pytest.raises(error, match=message):
            register_model(name, other)
    with pytest.raises(ValueError, match="unknown model 'deit'"):
        register_model("mine", model, like="deit")
