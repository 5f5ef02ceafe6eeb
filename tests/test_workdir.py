"""A work directory is held by one run; signals inside an evaluation; files that cannot be read or written."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from configs import quickstart
from test_toy_task import ROOT, boxes, records
from vitpyramid.tasks import ConfigError, make_task
from vitpyramid.train import loop
from vitpyramid.train.workdir import held
from vitpyramid.weights import intact, store

MAIN = [sys.executable, str(ROOT / "main.py")]


def python(program, *args):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", f"import sys; from pathlib import Path\n{program}", *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HOLD = """
import time
from vitpyramid.train.workdir import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_the_first_is_named(tmp_path):
    first = python(HOLD, tmp_path)
    assert first.stdout.readline() == "held\n"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ConfigError, match=rf"--workdir={tmp_path}: process {first.pid} on .* has been running"
    ) as error:
        loop.train(boxes(), tmp_path)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing was cleaned up or written
    first.kill()
    first.communicate()
    with held(tmp_path):  # a dead owner's lock is taken over
        pass


def test_a_temporary_checkpoint_of_a_running_one_is_left_alone(tmp_path):
    writing = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    writing.mkdir(parents=True)
    with held(tmp_path):
        second = python("from test_workdir import *\nloop.train(boxes(), Path(sys.argv[1]))", tmp_path)
        assert "has been running there" in second.communicate(timeout=100)[1]
    assert writing.is_dir()


def test_a_stop_inside_an_evaluation_is_heard_and_nothing_is_lost(tmp_path):
    """A signal in the middle of a long evaluation: saved before it began, gone within seconds, evaluated on return."""
    task = boxes()

    class Slow(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                assert number < 6, "the evaluation went on"
                yield batch

    slow = dataclasses.replace(task, eval_batches=lambda: Slow(list(task.eval_batches()) * 50))
    begin = time.monotonic()
    summary = loop.train(slow, tmp_path)
    assert time.monotonic() - begin < 60
    assert summary.step == 20 and not summary.finished
    assert intact.steps(tmp_path / "checkpoints")[0] == 20
    assert not any("eval/loss" in record for record in records(tmp_path))
    summary = loop.train(task, tmp_path)
    assert summary.finished
    assert [record["step"] for record in records(tmp_path) if "eval/loss" in record] == [20, 40, 60, 80]


def test_a_finished_run_adds_nothing_to_its_records(tmp_path):
    first = loop.train(boxes(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = loop.train(boxes(), tmp_path)
    assert again.metrics == first.metrics and again.finished
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_damaged_records_are_kept_beside_the_others(tmp_path):
    loop.train(boxes(), tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:3], b"\xff\x00{nonsense\n", *lines[4:]])
    file.write_bytes(damaged)
    loop.train(boxes(), tmp_path)
    assert file.read_bytes() == b"".join([*lines[:3], *lines[4:]])
    (kept,) = tmp_path.glob("metrics.damaged-*.jsonl")
    assert kept.read_bytes() == damaged


def test_no_space_is_told_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"checkpoints: expected space for the checkpoint of step 5, .* 0.0 MB are free"):
        loop.train(boxes(), tmp_path)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--workdir={file}"], 74, "{file}: File exists"),
        (["--workdir={file}/run"], 74, "{file}/run: Not a directory"),
        (["--workdir={folder}/" + "x" * 300], 74, "File name too long"),
        (["--workdir=s3://bucket/run"], 1, "--workdir=s3://bucket/run: expected a path or gs://"),
        (["--num_processes=2"], 1, "--coordinator_address, which is missing"),
        (["--process_id=1"], 1, "--coordinator_address, which is missing"),
        (["--distributed"], 1, "--distributed: cannot find the other processes"),
    ],
)
def test_one_line_and_an_exit_code(args, code, words, tmp_path, data_dir):
    names = {"file": str(tmp_path / "file"), "folder": str(tmp_path)}
    Path(names["file"]).write_text("content")
    args = [arg.format(**names) for arg in args]
    result = subprocess.run(
        [*MAIN, *args, f"--config.data.data_dir={data_dir}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert words.format(**names) in output.splitlines()[-1]
    assert "Traceback" not in output
    assert Path(names["file"]).read_text() == "content"


def test_an_image_that_cannot_be_read_is_an_input_error(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 40), (i, 20, 30)).save(folder / f"{i}.png")
    broken = tmp_path / "data" / "train" / "b" / "3.png"
    broken.write_bytes(b"no image")
    config = quickstart.get_config()
    config.update_from_flattened_dict({"data.name": "folder", "data.data_dir": str(tmp_path / "data")})
    config.update_from_flattened_dict({"data.eval_split": "val", "model.num_classes": 0, "batch_size": 16})
    batches = make_task(config).train_batches(0)
    with pytest.raises(OSError, match=re.escape(str(broken))) as error:  # main.py prints these and ends with 74
        next(batches)
    assert "\n" not in str(error.value)
