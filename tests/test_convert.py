"""Names and layouts, PyTorch to Flax and back."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import golden
from vitpyramid import create_model
from vitpyramid.weights import flax_to_torch, torch_to_flax


@functools.cache
def weights() -> dict:
    return golden.read("pvt_tiny_224x224").state_dict()


def other_weights(num_classes: int, image_size: int) -> dict:
    """A PVT-Tiny state dict for another head and other position tables."""
    rng = np.random.default_rng(0)
    changed = {"head.weight": (num_classes, 512), "head.bias": (num_classes,)}
    for stage, dim in enumerate((64, 128, 320, 512), start=1):
        changed[f"pos_embed{stage}"] = (1, (image_size // 2 ** (stage + 1)) ** 2 + (stage == 4), dim)
    return {**weights(), **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in changed.items()}}


def assert_same(left: dict, right: dict):
    assert sorted(left) == sorted(right)
    for name, array in left.items():
        assert type(array) is np.ndarray and array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name])


def test_names_and_layouts():
    params = torch_to_flax("pvt_tiny", weights())["params"]
    linear, conv = weights()["block1.0.attn.kv.weight"], weights()["block1.1.attn.sr.weight"]
    np.testing.assert_array_equal(params["block1_0"]["attn"]["kv"]["kernel"], linear.T)
    np.testing.assert_array_equal(params["block1_1"]["attn"]["sr"]["kernel"], np.einsum("oihw->hwio", conv))
    np.testing.assert_array_equal(params["patch_embed2"]["norm"]["scale"], weights()["patch_embed2.norm.weight"])
    np.testing.assert_array_equal(params["head"]["bias"], weights()["head.bias"])
    np.testing.assert_array_equal(params["pos_embed4"], weights()["pos_embed4"])
    np.testing.assert_array_equal(params["cls_token"], weights()["cls_token"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_the_identity(dtype):
    state_dict = {name: array.astype(dtype) for name, array in weights().items()}
    variables = torch_to_flax("pvt_tiny", state_dict)
    assert list(variables) == ["params"]
    back = flax_to_torch("pvt_tiny", variables)
    assert_same(back, state_dict)
    again = torch_to_flax("pvt_tiny", dict(reversed(back.items())))
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_takes_jax_arrays_and_returns_copies():
    variables = jax.tree.map(jnp.asarray, torch_to_flax("pvt_tiny", weights()))
    state_dict = flax_to_torch("pvt_tiny", variables)
    assert_same(state_dict, weights())
    state_dict["head.bias"][:] = 0
    state_dict["pos_embed1"][:] = 0
    assert_same(flax_to_torch("pvt_tiny", variables), weights())


@pytest.mark.parametrize("num_classes, image_size", [(10, 224), (1000, 384), (1, 96)])
def test_other_heads_and_position_tables(num_classes, image_size):
    state_dict = other_weights(num_classes, image_size)
    variables = torch_to_flax("pvt_tiny", state_dict)
    assert_same(flax_to_torch("pvt_tiny", variables), state_dict)
    model = create_model("pvt_tiny", num_classes=num_classes, image_size=image_size)
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, num_classes)


def test_errors_name_what_is_wrong():
    state_dict = dict(weights())
    del state_dict["cls_token"], state_dict["block3.1.mlp.fc1.bias"]
    state_dict["module.cls_token"] = weights()["cls_token"]
    state_dict["block2.0.attn.q.weight"] = np.zeros((128, 64), np.float32)
    with pytest.raises(ValueError) as error:
        torch_to_flax("pvt_tiny", state_dict)
    message = str(error.value)
    assert "pvt_tiny" in message
    assert "missing (2):\n  block3.1.mlp.fc1.bias\n  cls_token" in message
    assert "unexpected (1):\n  module.cls_token" in message
    assert "wrong shape (1):\n  block2.0.attn.q.weight (128, 64), expected (128, 128)" in message


def test_errors_in_the_other_direction_name_flax_paths():
    params = torch_to_flax("pvt_tiny", weights())["params"]
    swapped = {**params, "head": {"kernel": params["head"]["kernel"].T, "scale": params["head"]["bias"]}}
    with pytest.raises(ValueError) as error:
        flax_to_torch("pvt_tiny", {"params": swapped})
    message = str(error.value)
    assert "missing (1):\n  params/head/bias" in message and "unexpected (1):\n  params/head/scale" in message
    assert "params/head/kernel (1000, 512), expected (512, 1000)" in message
    with pytest.raises(ValueError, match=r"unexpected.*\n  block1_0"):
        flax_to_torch("pvt_tiny", params)


def test_long_lists_are_cut_and_counted():
    deeper = golden.manifest()["pvt_small"]["state_dict"]
    with pytest.raises(ValueError) as error:
        torch_to_flax("pvt_tiny", {name: np.zeros(shape, np.float32) for name, shape in deeper.items()})
    missing = len(deeper) - len(weights())
    assert f"unexpected ({missing}):" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 + 1 + 10 + 1


@pytest.mark.parametrize("rows", [3000, 49, 0])
def test_tables_that_fit_no_image_size_are_refused(rows):
    state_dict = {**weights(), "pos_embed1": np.zeros((1, rows, 64), np.float32)}
    with pytest.raises(ValueError, match="pos_embed1"):
        torch_to_flax("pvt_tiny", state_dict)


def test_tables_of_different_image_sizes_are_refused():
    state_dict = {**weights(), "pos_embed2": other_weights(10, 384)["pos_embed2"]}
    with pytest.raises(ValueError, match=r"pos_embed2 \(1, 2304, 128\), expected \(1, 784, 128\)"):
        torch_to_flax("pvt_tiny", state_dict)
