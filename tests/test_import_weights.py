"""State dicts of other shapes: containers, dtypes, problems, heads, position tables."""

import functools
import re

import numpy as np
import pytest

from harness import random_state_dict
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.importer import import_weights


@functools.cache
def pvt() -> dict:
    return random_state_dict("pvt_micro")


def prefixed(prefix: str, state_dict: dict) -> dict:
    return {prefix + key: array for key, array in state_dict.items()}


OTHER = {"weight": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("content", "weights", "container"),
    [
        (pvt, "auto", "the file itself"),
        (lambda: {"model": pvt(), "epoch": 3, "args": {}}, "auto", "model"),
        (lambda: {"state_dict": OTHER, "state_dict_ema": pvt(), "arch": "x"}, "auto", "state_dict_ema"),
        (lambda: {"state_dict": OTHER, "state_dict_ema": pvt()}, "ema", "state_dict_ema"),
        (lambda: {"state_dict": pvt(), "state_dict_ema": OTHER}, "raw", "state_dict"),
        (lambda: {"model": pvt(), "model_ema": OTHER}, "auto", "model"),
        (lambda: {"model": OTHER, "model_ema": pvt()}, "ema", "model_ema"),
        (lambda: {"net": prefixed("module.", pvt()), "acc": 98.0}, "auto", "net"),
        (lambda: {"state_dict": prefixed("module._orig_mod.", pvt())}, "auto", "state_dict"),
        (lambda: prefixed("backbone.net.", pvt()), "auto", "the file itself"),
        (lambda: {"state_dict": {**prefixed("model.", pvt()), "none": None}, "epoch": 1}, "auto", "state_dict"),
        (lambda: {"n_averaged": np.zeros((), int), **prefixed("module.", pvt())}, "auto", "the file itself"),
        (lambda: {**prefixed("model.", pvt()), **prefixed("ema_model.", pvt())}, "auto", "the file itself"),
        (lambda: {**pvt(), "scalar": 1}, "auto", "the file itself"),
        (lambda: {**pvt(), "total_ops": np.zeros(1), "block1.0.total_params": np.zeros(1)}, "auto", "the file itself"),
    ],
)
def test_containers(content, weights, container):
    contents = open_contents(content(), weights)
    assert contents.container == container
    assert contents.state_dict.keys() == pvt().keys()
    for key, array in contents.state_dict.items():
        np.testing.assert_array_equal(array, pvt()[key])
    file_keys = list(content().get(container, content()))
    assert contents.ignored == [key for key in file_keys if key not in contents.origin.values()]
    assert all(contents.prefix + key == file_key for key, file_key in contents.origin.items())


@pytest.mark.parametrize(
    ("content", "weights", "message"),
    [
        (lambda: [1, 2], "auto", "holds a list"),
        (lambda: {"epoch": 3, "optimizer": {}}, "auto", "epoch, optimizer"),
        (
            lambda: {"state_dict": pvt()},
            "ema",
            "expected one of state_dict_ema, model_ema, ema in the file; it has state_",
        ),
        (pvt, "ema", "one set of weights without a name"),
        (lambda: {"state_dict_ema": pvt()}, "raw", "it has state_dict_ema"),
        (lambda: {**pvt(), **prefixed("module.", pvt())}, "auto", "under the prefixes '', 'module.'"),
    ],
)
def test_no_state_dict_is_an_error(content, weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_contents(content(), weights)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_values_that_are_not_finite_are_refused_unless_allowed(value):
    weight = pvt()["norm.weight"].astype(np.float64)
    weight[3] = value
    contents = open_contents({**pvt(), "norm.weight": weight})
    with pytest.raises(ValueError, match=r"nonfinite \(1\):\n  norm\.weight\n--allow=nonfinite"):
        import_weights(contents)
    converted = import_weights(contents, allow=("nonfinite",))
    assert converted.notes == {"nonfinite": ["norm.weight"]}
    head = np.full(pvt()["head.weight"].shape, value)
    assert "nonfinite" not in import_weights(open_contents({**pvt(), "head.weight": head}), num_classes=7).notes


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "int64", "float8_e4m3fn"])
def test_weights_that_are_no_floating_point_are_refused(dtype):
    contents = open_contents({**pvt(), "norm.weight": pvt()["norm.weight"].astype(dtype)})
    with pytest.raises(
        ValueError, match=rf"norm\.weight is of {dtype}, expected one of float16, bfloat16, float32, float64"
    ):
        import_weights(contents, allow=("missing", "unexpected", "wrong shape", "nonfinite"))


def test_numbers_of_classes_and_sides_are_bounded():
    contents = open_contents(pvt())
    for numbers in ({"num_classes": 10**12}, {"image_size": 10**5}):
        with pytest.raises(ValueError, match="expected at most 100000 and 4096"):
            import_weights(contents, **numbers)


def damaged() -> dict:
    state_dict = {**pvt(), "extra": np.zeros(2, np.float32), "norm.bias": np.zeros(3, np.float32)}
    del state_dict["block1.0.attn.q.bias"]
    return state_dict


def test_problems_are_listed_and_refused_unless_allowed():
    contents = open_contents(damaged())
    with pytest.raises(ValueError) as error:
        import_weights(contents, allow=("missing",))
    for line in ("unexpected (1):\n  extra", "norm.bias (3,), expected (256,)", "--allow=unexpected,wrong_shape"):
        assert line in str(error.value)
    assert "attn.q.bias" not in str(error.value)
    converted = import_weights(contents, allow=("missing", "unexpected", "wrong shape"))
    assert converted.notes["initialised"] == ["block1.0.attn.q.bias", "norm.bias"]
    assert converted.notes["unexpected"] == ["extra"]
    np.testing.assert_array_equal(converted.variables["params"]["norm"]["bias"], np.zeros(256))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_parameters_become_float32(dtype):
    contents = open_contents({key: array.astype(dtype) for key, array in pvt().items()})
    kernel = import_weights(contents).variables["params"]["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, pvt()["head.weight"].astype(dtype).astype(np.float32).T)


def test_new_head_is_initialised_and_the_same_number_of_classes_keeps_it():
    contents = open_contents(random_state_dict("pit_ti_distilled", 10, 64))
    kept = import_weights(contents, num_classes=10)
    np.testing.assert_array_equal(kept.variables["params"]["head"]["kernel"], contents.state_dict["head.weight"].T)
    converted = import_weights(contents, num_classes=3)
    assert converted.notes == {"initialised": ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]}
    for head in ("head", "head_dist"):
        kernel = converted.variables["params"][head]["kernel"]
        assert kernel.shape == (256, 3)
        assert 0 < np.abs(kernel).max() <= 1 / 16  # uniform in +-1 / sqrt(256): PyTorch's default, as PiT has it


# Row 1 of the matrix that PyTorch's bicubic `interpolate` is, from 5 to 7.
TORCH_ROW = [0.4198250728862974, 0.6851311953352769, -0.10495626822157435, 0.0, 0.0]


def test_position_tables_are_resized_as_pytorch_does():
    contents = open_contents(random_state_dict("deit_tiny_distilled", 10, 80))
    converted = import_weights(contents, image_size=112)
    assert (converted.network["image_size"], converted.notes) == (112, {"resized": ["pos_embed"]})
    table, old = converted.variables["params"]["pos_embed"], contents.state_dict["pos_embed"]
    np.testing.assert_array_equal(table[:, :2], old[:, :2])
    row = np.asarray(TORCH_ROW)
    expected = np.einsum("h,w,hwc->c", row, row, old[0, 2:].reshape(5, 5, -1))
    np.testing.assert_allclose(table[0, 2:].reshape(7, 7, -1)[1, 1], expected, atol=1e-6)


def test_each_table_of_pvt_and_the_map_of_pit_are_resized():
    converted = import_weights(open_contents(pvt()), image_size=64)
    assert converted.notes["resized"] == ["pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4"]
    table = converted.variables["params"]["pos_embed4"]
    np.testing.assert_allclose(table[:, 1:], np.repeat(pvt()["pos_embed4"][:, 1:], 4, axis=1), rtol=1e-6)
    pit = random_state_dict("pit_ti", 10, 64)
    converted = import_weights(open_contents(pit), image_size=96)
    assert converted.variables["params"]["pos_embed"].shape == (1, 11, 11, 64)


def test_tables_that_are_computed_are_resized_too():
    converted = import_weights(open_contents(random_state_dict("t2t_vit_7", 10, 64)), image_size=96)
    assert converted.variables["constants"]["pos_embed"].shape == (1, 37, 256)
