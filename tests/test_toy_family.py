"""A family is its model file, its names, its line in the registry: with these the rest of the package knows it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import harness
import test_models
import toy_family
from vitpyramid.models import registry
from vitpyramid.models.registry import create_model, list_models
from vitpyramid.models.stack import stack_blocks
from vitpyramid.tools.summary import summarise
from vitpyramid.train.optim import layers_to_head
from vitpyramid.weights import flax_to_torch, names
from vitpyramid.weights.containers import Contents
from vitpyramid.weights.importer import import_weights


@pytest.fixture(autouse=True)
def fifth_family(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, toy_family))
    for name, variant in toy_family.VARIANTS.items():  # as the registry does when it is imported
        monkeypatch.setitem(registry.VARIANTS, name, variant)
    monkeypatch.setitem(names.TORCH_MODULE, "entry", "stem.proj")


def random_weights(name: str) -> dict:
    return harness.random_variables(create_model(name))


@pytest.mark.parametrize("name", toy_family.VARIANTS)
def test_it_keeps_the_contract(name):
    assert name in list_models("toy_")
    test_models.test_parameters_are_as_published_and_weights_go_both_ways(name)
    test_models.test_stages_hold_every_parameter_once(name)
    test_models.test_position_tables_are_of_the_image_size(name)
    test_models.test_vectors_and_what_the_family_spares_are_not_decayed(name)


def test_its_blocks_are_the_layers_of_layer_decay():
    depths = traverse_util.flatten_dict(layers_to_head(random_weights("toy_thin")["params"], create_model("toy_thin")))
    found = [next(depth for path, depth in depths.items() if path[0] == part) for part in ("head", "late_0", "down")]
    assert found == [0, 1, 2]
    assert depths["layers_1", "norm1", "scale"] == 2
    assert depths["entry", "kernel"] == depths[("pos_embed",)] == 4


def test_its_blocks_are_scanned():
    model, variables, images = create_model("toy_thin"), random_weights("toy_thin"), harness.random_images(2, 32, 48)
    stacked = {"params": stack_blocks(variables["params"], model.stages)}
    assert stacked["params"]["layers"]["norm1"]["scale"].shape == (2, 8)
    logits = harness.apply(model.clone(remat=True, scan=True), stacked, images)
    np.testing.assert_allclose(logits, harness.apply(model, variables, images), rtol=1e-4, atol=1e-5)


def test_it_is_summarised():
    summary = summarise("toy_thin")
    assert summary.parameters == toy_family.VARIANTS["toy_thin"].params
    assert [(level.stride, level.height, level.channels) for level in summary.levels] == [(8, 4, 8), (16, 2, 8)]


def test_its_weights_are_recognised_and_fit_other_images():
    variables = random_weights("toy_wide")
    state_dict = flax_to_torch("toy_wide", variables)
    assert state_dict["stem.proj.weight"].shape == (16, 3, 8, 8)
    converted = import_weights(Contents(state_dict, {}, "the file itself", "", "official", []), image_size=64)
    assert converted.network == {"name": "toy_wide", "num_classes": 10, "image_size": 64}
    assert converted.notes == {"resized": ["pos_embed"]}
    assert converted.variables["params"]["pos_embed"].shape == (1, 64, 16)
    apply = functools.partial(create_model("toy_wide", image_size=64).apply, converted.variables)
    assert jax.eval_shape(apply, jnp.zeros((1, 64, 64, 3))).shape == (1, 10)
