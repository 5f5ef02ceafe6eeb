"""Checkpoints that are not what was written are found out, named, passed over and kept."""

import json
import logging
import shutil

import numpy as np
import pytest

from test_toy_task import boxes, records
from vitpyramid import load_pretrained
from vitpyramid.tasks import ConfigError
from vitpyramid.train import loop
from vitpyramid.weights import intact, store
from vitpyramid.weights.store import write_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("boxes")
    loop.train(boxes(), workdir)
    assert intact.steps(workdir / "checkpoints") == [80, 75]
    return workdir


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "one bit": (lambda step: flip(largest(step / "state")), "has other bytes in state/"),
    "cut": (
        lambda step: largest(step / "state").write_bytes(largest(step / "state").read_bytes()[:-7]),
        "were written",
    ),
    "zeroed": (
        lambda step: largest(step / "state").write_bytes(bytes(largest(step / "state").stat().st_size)),
        "other",
    ),
    "missing": (lambda step: largest(step / "state").unlink(), "has no state/"),
    "no metadata": (lambda step: (step / "meta" / "metadata").unlink(), "has no meta/metadata"),
    "rubbish metadata": (lambda step: (step / "meta" / "metadata").write_text("{"), "damaged metadata"),
    "empty": (empty, "has no _CHECKPOINT_METADATA"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_is_taken(finished, tmp_path, kind, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    damage, words = DAMAGE[kind]
    damage(workdir / "checkpoints" / "80")
    with caplog.at_level(logging.WARNING):
        step, _ = loop.evaluate_checkpoint(boxes(), workdir)
    assert step == 75
    assert f"{workdir}/checkpoints/80" in caplog.text and words in caplog.text
    assert intact.steps(workdir / "checkpoints") == [80, 75]  # an evaluation moves nothing


def test_a_run_goes_on_from_the_one_before_and_keeps_the_damaged(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    flip(largest(workdir / "checkpoints" / "80" / "state"))
    summary = loop.train(boxes(), workdir)
    assert summary.step == 80
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["75", "80", "80.damaged-1"]
    values = [{k: v for k, v in record.items() if "second" not in k} for record in records(workdir)]
    assert values == [{k: v for k, v in record.items() if "second" not in k} for record in records(finished)]


def test_a_foreign_folder_is_no_checkpoint(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "99").mkdir()
    (folder / "99" / "photo.jpg").write_bytes(b"photo")
    assert intact.newest_intact(folder, set_aside=True) == 80
    assert (folder / "99.damaged-1" / "photo.jpg").read_bytes() == b"photo"
    loop.train(boxes(5.0), tmp_path / "run", allow_config_change=True)  # goes on, and saves
    assert intact.newest_intact(folder) == 100
    assert [path.name for path in (folder / "99.damaged-1").iterdir()] == ["photo.jpg"]


def test_none_intact_is_one_line(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in (75, 80):
        flip(largest(workdir / "checkpoints" / str(step) / "state"))
    for act in (lambda: loop.train(boxes(), workdir), lambda: loop.evaluate_checkpoint(boxes(), workdir)):
        with pytest.raises(OSError, match="expected an intact checkpoint, 80 has other bytes") as error:
            act()
        assert "\n" not in str(error.value)
    assert intact.steps(workdir / "checkpoints") == [80, 75]


def test_checksums_of_another_version_are_not_needed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "80" / intact.SUMS).unlink()
    assert intact.newest_intact(folder) == 80


def test_converted_weights_are_sealed(tmp_path):
    variables = {"params": {"head": {"kernel": np.ones((300, 300), np.float32)}}}
    write_weights(tmp_path, {"name": "pvt_micro", "num_classes": 3, "image_size": 32}, variables)
    assert set(json.loads((tmp_path / "checkpoints" / "0" / intact.SUMS).read_text())) >= {"meta/metadata"}
    assert store.read_weights(tmp_path).step == 0
    flip(largest(tmp_path / "checkpoints" / "0" / "state"))
    with pytest.raises(OSError, match="expected an intact checkpoint"):
        load_pretrained(tmp_path)


def test_other_arrays_are_told_in_one_line(finished):
    task = boxes()
    task.config.optim.name = "sgd"
    with pytest.raises(ConfigError, match=r"80 has other arrays than this config's network and optimizer: \d+ differ"):
        loop.train(task, finished, allow_config_change=True)
