"""Networks for dense prediction in files and folders: the converter, `load_pretrained`, what a run leaves."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from harness import random_variables
from vitpyramid import create_model, load_pretrained
from vitpyramid.models.stack import stack_blocks
from vitpyramid.tools import convert as command
from vitpyramid.weights import dense_names, store

RETINANET = {"name": "retinanet_rest_small", "backbone": "rest_micro", "num_classes": 3, "image_size": 32}
BUFFERS = {
    "pixel_mean": np.zeros((3, 1, 1), np.float32),
    "anchor_generator.cell_anchors.0": np.zeros((9, 4), np.float32),
    "backbone.bottom_up.stem.norm1.num_batches_tracked": np.zeros((), np.int64),
}


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    monkeypatch.setattr(command, "find_spec", lambda name: None)  # as without PyTorch
    return command.main()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as detectron2 writes it, in a process of several, and its parameters by name."""
    shapes, rng = dense_names.torch_shapes(create_model(**RETINANET)), np.random.default_rng(0)
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    file = tmp_path_factory.mktemp("released") / "retinanet.safetensors"
    save_file({f"module.{key}": array for key, array in (weights | BUFFERS).items()}, file)
    return file, weights


def flat(variables) -> dict:
    return traverse_util.flatten_dict(variables, sep="/")


def test_there_and_back(monkeypatch, tmp_path, released, capsys):
    file, weights = released
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    options = [f"--model={RETINANET['name']}", f"--backbone={RETINANET['backbone']}"]
    assert run(monkeypatch, file, f"--out={out}", *options) == 0
    printed = capsys.readouterr().out
    assert "took the file itself, detectron2 names behind 'module.'" in printed
    assert "is retinanet_rest_small on rest_micro, 3 classes" in printed
    report = json.loads((out / "conversion.json").read_text())
    size = create_model(**RETINANET).backbone.image_size
    assert report["network"] == RETINANET | {"image_size": size}
    assert report["keys"] == {key: f"module.{key}" for key in weights}
    assert set(report["ignored"]) == {f"module.{key}" for key in BUFFERS}

    assert run(monkeypatch, out, "--to-torch", f"--out={back}") == 0
    again = {key: array for key, array in load_file(back).items() if not key.endswith("num_batches_tracked")}
    assert again.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)

    model, variables = load_pretrained(out)
    assert model == create_model(**RETINANET)
    assert variables["batch_stats"]["loss_normaliser"] == 100
    name, backbone = RETINANET["name"], RETINANET["backbone"]
    other, changed = load_pretrained(file, name, backbone=backbone, num_classes=4)
    assert other == create_model(**RETINANET | {"num_classes": 4})
    variables, changed = flat(variables), flat(changed)
    differing = {path for path, array in variables.items() if not np.array_equal(changed[path], array)}
    assert differing == {f"params/bbox_head/retina_cls/{leaf}" for leaf in ("kernel", "bias")}
    np.testing.assert_allclose(changed["params/bbox_head/retina_cls/bias"], -np.log(99), rtol=1e-6)
    with pytest.raises(ValueError, match=r"out: expected heads on rest_small, these stand on rest_micro"):
        load_pretrained(out, name, backbone="rest_small")
    with pytest.raises(ValueError, match=r"expected weights of retinanet_pvt_tiny, these are of retinanet_rest_small"):
        load_pretrained(out, "retinanet_pvt_tiny")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("detr_pvt_micro", "facebookresearch"),
        ("detr_pvt_micro", "huggingface"),
        ("deformable_detr_pit_micro", "fundamentalvision"),
        ("deformable_detr_pit_micro", "huggingface"),
    ],
)
def test_the_library_is_kept(monkeypatch, tmp_path, name, library, capsys):
    """Of networks whose files have the names of several, and arrays in parts or twice: what went in comes out."""
    model = create_model(name, library=library, num_classes=4, image_size=64)
    state_dict = dense_names.to_state_dict(model, random_variables(model))
    save_file(state_dict, tmp_path / "in.safetensors")
    assert run(monkeypatch, tmp_path / "in.safetensors", f"--model={name}", f"--out={tmp_path / 'out'}") == 0
    assert f"took the file itself, {library} names\n" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "out")[0] == model
    assert run(monkeypatch, tmp_path / "out", "--to-torch", f"--out={tmp_path / 'back.safetensors'}") == 0
    again = load_file(tmp_path / "back.safetensors")
    assert again.keys() == state_dict.keys()
    assert all(np.array_equal(array, again[key]) for key, array in state_dict.items())


def test_refused_conversions_write_nothing(monkeypatch, tmp_path, released, capsys):
    file, _ = released
    for options, message in (
        (["--model=retinanet_rest_small", "--backbone=rest_smal"], "unknown model 'rest_smal'; expected one of"),
        (["--model=rest_micro", "--backbone=rest_micro"], "--backbone=rest_micro: expected beside a --model that"),
        (["--model=retinanet_rest_smal"], "unknown model 'retinanet_rest_smal'; expected one of list_models(), such"),
        (["--model=semantic_fpn_pvt_micro"], "these are not the parameters of semantic_fpn_pvt_micro\nmissing ("),
    ):
        assert run(monkeypatch, file, f"--out={tmp_path / 'out'}", *options) == 1
        assert message in capsys.readouterr().err
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("scan", [False, True])
def test_what_a_run_leaves(tmp_path, scan):
    network = {"name": "semantic_fpn_pvt_micro", "backbone": "", "num_classes": 5, "image_size": 64}
    model = create_model(**network)
    variables = random_variables(model)
    params = stack_blocks(variables["params"], model.stages) if scan else variables["params"]
    state = {"step": np.int32(7), "params": params, "model_state": {"batch_stats": variables["batch_stats"]}, "ema": {}}
    with store.open_checkpoints(tmp_path) as manager:
        store.save(manager, 7, state, {"network": network | {"scan": scan}, "ema": False})
    found, loaded = load_pretrained(tmp_path)
    assert found == model
    loaded, variables = flat(loaded), flat(variables)
    assert loaded.keys() == variables.keys()
    assert all(np.array_equal(array, variables[path]) for path, array in loaded.items())
    backbone = load_pretrained(tmp_path, features_only=True)[1]
    assert set(jax.tree.leaves([*backbone["params"]])) == {"backbone"}
