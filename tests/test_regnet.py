"""RegNetY against timm's (goldens/make_regnet.py), and as a network like the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
from vitpyramid import create_model
from vitpyramid.models.registry import get_variant
from vitpyramid.weights import names, torch_to_flax


@functools.cache
def reference() -> dict:
    with np.load(golden.FOLDER / "regnety.npz") as archive:
        return dict(archive)


def weights(name: str, num_classes: int) -> dict:
    shapes = names.in_torch(names.model_shapes(name, num_classes, 64))
    return {key: golden.weight(key, shape, 0, "standard") for key, shape in shapes.items()}


def test_parameters_are_timms():
    expected = reference()["names"].tolist()
    state_dict = weights("regnety_160", 1000)
    found = [f"{key} {list(value.shape)}" for key, value in state_dict.items()]
    counters = [line for line in expected if "num_batches_tracked" in line]
    assert sorted(found) == sorted(set(expected) - set(counters))
    trainable = sum(v.size for key, v in state_dict.items() if ".running_" not in key)
    assert trainable == reference()["parameters"] == get_variant("regnety_160").params == 83_590_140


def test_small_network_equals_timms_stage_by_stage():
    found = reference()
    with jax.enable_x64(True):
        model = create_model("regnety_micro", dtype=jnp.float64)
        variables = torch_to_flax("regnety_micro", weights("regnety_micro", 10))
        variables = jax.tree.map(jnp.float64, variables)
        images = jnp.float64(golden.images(1, 2, 45, 70))
        both = jax.jit(lambda v, x: (model.apply(v, x, method="features"), model.apply(v, x)))
        levels, logits = both(variables, images)
        assert golden.relative_error(logits, found["small/logits"]) < 1e-12
        for number, level in enumerate(levels, start=1):
            x = np.asarray(level.x).transpose(0, 3, 1, 2)
            assert x.shape == tuple(found[f"small/{number}/shape"])
            sample = x.ravel()[np.linspace(0, x.size - 1, 128).astype(int)]
            assert golden.relative_error(sample, found[f"small/{number}"]) < 1e-12
        assert [level.stride for level in levels] == [4, 8, 16, 32]


def test_the_teacher_equals_timms():
    model = create_model("regnety_160")
    variables = torch_to_flax("regnety_160", weights("regnety_160", 1000))
    logits = jax.jit(model.apply)(variables, golden.images(1, 2, 64, 96))
    assert golden.relative_error(logits, reference()["logits"]) < 1e-5  # float32


def test_training_updates_statistics():
    model, images = create_model("regnety_micro"), jnp.asarray(golden.images(1, 4, 32, 32))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, updated = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    for path, value in traverse_util.flatten_dict(updated["batch_stats"], sep="/").items():
        start = 0 if path.endswith("mean") else 1
        assert np.abs(value - start).max() > 0, path


@pytest.mark.parametrize("option", [{"scan": True}, {"drop_path_rate": 0.1}])
def test_what_it_cannot_do_is_an_error(option):
    with pytest.raises(ValueError, match="expected False and 0, RegNetY has neither"):
        jax.eval_shape(create_model("regnety_micro", **option).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
