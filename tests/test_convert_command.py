"""The command `python -m vitpyramid.tools.convert`, what takes its results, and `load_pretrained`."""

import dataclasses
import hashlib
import json
import os
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import vitpyramid
from configs import quickstart
from harness import random_state_dict
from vitpyramid.tasks import ConfigError, make_task
from vitpyramid.tools import convert as command
from vitpyramid.train import checkpoint, loop
from vitpyramid.train.program import build
from vitpyramid.train.sharding import make_mesh
from vitpyramid.train.state import create_state
from vitpyramid.weights import names
from vitpyramid.weights.store import open_checkpoints, write_weights


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    return command.main()


@pytest.fixture
def weights(tmp_path):
    """A file of weights as PyTorch would have written it."""
    path = tmp_path / "weights.safetensors"
    save_file(random_state_dict("pvt_micro"), path)
    return path


def assert_same(left: dict, right: dict):
    left, right = traverse_util.flatten_dict(left), traverse_util.flatten_dict(right)
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], err_msg="/".join(path))


def test_there_and_back(monkeypatch, tmp_path, weights, capsys):
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    assert run(monkeypatch, weights, f"--out={out}") == 0
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    assert digest in printed
    assert "recognised pvt_micro, 10 classes, 32 x 32 pixels" in printed
    report = json.loads((out / "conversion.json").read_text())
    assert report["sha256"] == digest
    assert report["network"] == {"name": "pvt_micro", "num_classes": 10, "image_size": 32}
    assert report["keys"] == {key: key for key in random_state_dict("pvt_micro")}

    monkeypatch.setattr(command, "find_spec", lambda name: None)  # as without PyTorch
    assert run(monkeypatch, out, "--to-torch", f"--out={back}") == 0
    again = load_file(back)
    assert again.keys() == random_state_dict("pvt_micro").keys()
    for key, array in random_state_dict("pvt_micro").items():
        np.testing.assert_array_equal(again[key], array)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "out", "weights.safetensors"]


def test_batch_statistics_go_there_and_back(monkeypatch, tmp_path):
    state_dict = names.flax_to_torch("rest_micro", names.torch_to_flax("rest_micro", random_state_dict("rest_micro")))
    save_file(state_dict, tmp_path / "rest.safetensors")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run(monkeypatch, tmp_path / "rest.safetensors", f"--out={tmp_path / 'out'}") == 0
    assert run(monkeypatch, tmp_path / "out", "--to-torch", f"--out={tmp_path / 'back.safetensors'}") == 0
    again = load_file(tmp_path / "back.safetensors")
    assert again.keys() == state_dict.keys()
    assert again["stem.norm1.num_batches_tracked"].dtype == np.int64
    for key, array in state_dict.items():
        np.testing.assert_array_equal(again[key], array)


def test_load_pretrained_gives_the_same_from_file_and_folder(monkeypatch, tmp_path, weights):
    assert run(monkeypatch, weights, f"--out={tmp_path / 'out'}") == 0
    model, variables = vitpyramid.load_pretrained(weights)
    assert (type(model).__name__, model.num_classes, model.image_size) == ("PVT", 10, 32)
    assert_same(variables, names.torch_to_flax("pvt_micro", random_state_dict("pvt_micro")))
    for changes in ({}, {"num_classes": 7, "image_size": 64, "seed": 1}):
        model, variables = vitpyramid.load_pretrained(weights, **changes)
        other_model, other = vitpyramid.load_pretrained(tmp_path / "out", "pvt_micro", **changes)
        assert other_model == model
        assert_same(other, variables)
    assert variables["params"]["head"]["kernel"].shape == (256, 7)
    assert variables["params"]["pos_embed1"].shape == (1, 16 * 16, 32)
    with pytest.raises(ValueError, match=r"expected weights of pvt_tiny, these are of pvt_micro"):
        vitpyramid.load_pretrained(tmp_path / "out", "pvt_tiny")
    with pytest.raises(ValueError, match=r"weights\.safetensors: these are not the parameters of pvt_tiny"):
        vitpyramid.load_pretrained(weights, "pvt_tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=pvt_tiny"], "these are not the parameters of pvt_tiny"),
        (["--model=pvt_tinny"], "unknown model 'pvt_tinny'; expected one of list_models(), such as pvt_tiny"),
        (["--weights=ema"], "--weights=ema: expected one of state_dict_ema"),
    ],
)
def test_refused_conversions_write_nothing(monkeypatch, tmp_path, weights, capsys, arguments, message):
    assert run(monkeypatch, weights, f"--out={tmp_path / 'out'}", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "weights.safetensors" in error or "unknown model" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors"]


@pytest.mark.parametrize(
    "argument",
    [
        *("--allow=everything", "--size=31", "--num-classes=0", "--weights=best"),
        *("--size=100000", "--num-classes=999999999999", "--seed=9223372036854775808", "--seed=" + "9" * 9999),
    ],
)
def test_bad_arguments_are_named(monkeypatch, tmp_path, weights, capsys, argument):
    with pytest.raises(SystemExit):
        run(monkeypatch, weights, f"--out={tmp_path / 'out'}", argument)
    message = capsys.readouterr().err.splitlines()[-1]
    assert argument.split("=")[0] in message
    assert len(message) < 200


def test_the_largest_seed(monkeypatch, tmp_path, weights):
    assert run(monkeypatch, weights, f"--out={tmp_path / 'out'}", "--num-classes=7", f"--seed={2**63 - 1}") == 0


def test_out_must_be_new_or_empty(monkeypatch, tmp_path, weights, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(command, "fetch", None)  # refused before any work
    for out, what in ((folder, folder), (weights, weights), (weights / "a", weights)):
        assert run(monkeypatch, weights, f"--out={out}") == 1
        assert f"--out={out}: expected a new or empty folder, {what} is none" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_devices_and_pipes_are_not_read(monkeypatch, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert run(monkeypatch, path, f"--out={tmp_path / 'out'}") == 1
        assert capsys.readouterr().err == f"error: {path}: expected a file or folder, this is a pipe or device\n"
        with pytest.raises(ValueError, match="this is a pipe or device"):
            vitpyramid.load_pretrained(path)


def test_weights_in_parts(monkeypatch, tmp_path, capsys):
    state_dict = random_state_dict("pvt_micro")
    keys = list(state_dict)
    files = {"model-1.safetensors": keys[:9], "model-2.safetensors": keys[9:]}
    for file, held in files.items():
        save_file({f"net\x1b.{key}": state_dict[key] for key in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    where = {f"net\x1b.{key}": file for file, held in files.items() for key in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert run(monkeypatch, index, f"--out={tmp_path / 'out'}") == 0
    assert "took the file itself, official names behind 'net\\x1b.'\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/conversion.json").read_text())["parts"].keys() == files.keys()
    _, variables = vitpyramid.load_pretrained(index)
    assert_same(variables, names.torch_to_flax("pvt_micro", state_dict))
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2"):
        vitpyramid.load_pretrained(index)


def test_nothing_is_replaced(monkeypatch, tmp_path, weights, capsys):
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    assert run(monkeypatch, weights, f"--out={out}") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(monkeypatch, weights, f"--out={out}") == 1
    back.write_text("mine")
    assert run(monkeypatch, out, "--to-torch", f"--out={back}") == 1
    assert capsys.readouterr().err.count("nothing is replaced") == 2
    assert back.read_text() == "mine"
    with pytest.raises(ConfigError, match="this one holds converted weights"):
        loop.train(make_task(quickstart.get_config()), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_evaluation_takes_converted_weights(monkeypatch, tmp_path, weights, data_dir):
    assert run(monkeypatch, weights, f"--out={tmp_path / 'out'}") == 0
    config = quickstart.get_config()
    config.update_from_flattened_dict({"data.data_dir": data_dir, "compile_cache": "", "ema.decay": 0.9})
    step, metrics = loop.evaluate_checkpoint(make_task(config), tmp_path / "out")
    assert step == 0
    assert metrics.keys() == {"loss", "top1", "top5"}
    config.model.name = "pvt_tiny"
    with pytest.raises(ConfigError, match=r"model\.name: 'pvt_micro' -> 'pvt_tiny'"):
        loop.evaluate_checkpoint(make_task(config), tmp_path / "out")


@pytest.mark.parametrize("scan", [False, True])
def test_load_pretrained_takes_a_work_directory(tmp_path, scan):
    config = quickstart.get_config()
    config.update_from_flattened_dict({"ema.decay": 0.9, "model.remat": scan, "model.scan": scan})
    task = dataclasses.replace(make_task(config), num_examples=lambda: 640)
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        program = build(task, mesh)
        state = create_state(program.init, program.state)
    state = state.replace(step=state.step + 7, ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    with open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, state, task)
    raw_model, raw = vitpyramid.load_pretrained(tmp_path, weights="raw")
    model, average = vitpyramid.load_pretrained(tmp_path)
    assert model == raw_model == vitpyramid.create_model("pvt_micro", num_classes=10, image_size=32)
    assert raw["params"]["block1_0"]["attn"]["q"]["kernel"].ndim == 2
    assert_same(average, jax.tree.map(lambda leaf: leaf + 1, raw))
    if not scan:
        assert_same(raw, jax.device_get(state.variables))


def test_a_folder_with_weights_of_another_network_is_an_error(tmp_path):
    variables = names.torch_to_flax("pvt_micro", random_state_dict("pvt_micro"))
    del variables["params"]["cls_token"]
    write_weights(tmp_path, {"name": "pvt_micro", "num_classes": 11, "image_size": 32}, variables)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: these are not the parameters of pvt_micro") as error:
        vitpyramid.load_pretrained(tmp_path, num_classes=7)
    assert "missing (1):\n  params/cls_token" in str(error.value)
    assert "params/head/kernel (256, 10), expected (256, 11)" in str(error.value)


def test_a_folder_without_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with a complete checkpoint in checkpoints/"):
        vitpyramid.load_pretrained(tmp_path)
