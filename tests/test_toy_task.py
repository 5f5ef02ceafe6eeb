"""A task of another shape, boxes instead of classes: trained, evaluated, killed and resumed by the same loop."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import toy_boxes
from configs import base
from vitpyramid.train import loop
from vitpyramid.train.report import format_summary

ROOT = Path(__file__).parent.parent


def boxes(epochs=4.0):
    config = base.get_config()
    config.update_from_flattened_dict({"batch_size": 16, "eval.batch_size": 16, "epochs": epochs, "ema.decay": 0.5})
    config.update_from_flattened_dict({"optim.lr": 3e-3, "optim.lr_batch": 0, "schedule.warmup_epochs": 0.1})
    config.update_from_flattened_dict({"checkpoint.every_epochs": 0.25, "log.every_steps": 1, "compile_cache": ""})
    return toy_boxes.make_task(config)


def slow_run(workdir, step):
    """A run that says when it has come to `step`, and gives time to kill it."""

    def train_batches(start):
        for number, batch in enumerate(task.train_batches(start), start=start):
            if number == step:
                print("there", flush=True)
                time.sleep(1)
            yield batch

    task = boxes()
    loop.train(dataclasses.replace(task, train_batches=train_batches), Path(workdir))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("boxes")
    return workdir, loop.train(boxes(), workdir)


def test_it_learns(finished):
    workdir, summary = finished
    losses = [record["train/loss"] for record in records(workdir) if "train/loss" in record]
    assert len(losses) == summary.total_steps == 80
    wide = [record["train/wide"] for record in records(workdir) if "train/wide" in record]
    assert summary.totals == {"wide": sum(wide)} and 0 < wide[0] < sum(wide)
    assert "left out     " + f"wide {sum(wide):.3f}, over all steps" in format_summary(summary, boxes(), workdir, "")
    assert losses[-1] < 0.5 * losses[0]
    assert {"loss", "iou", "worst", "ema_loss", "ema_iou", "ema_worst"} == set(summary.metrics)


def test_what_is_collected_is_of_every_example_once(finished):
    """All overlaps are gathered on the host: 100 examples in batches of 16, the last one padded."""
    workdir, summary = finished
    step, metrics = loop.evaluate_checkpoint(boxes(), workdir)
    assert step == 80
    assert metrics == pytest.approx(summary.metrics, rel=1e-5)
    assert 0 <= metrics["worst"] < metrics["iou"]


@pytest.mark.parametrize("busy", (0, 0.2))
def test_a_step_waits_for_its_batch_while_the_devices_have_nothing_to_do(tmp_path, monkeypatch, busy):
    """Batches take 0.05 s to make, steps no time or four times as long."""

    def train_batches(start):
        for batch in task.train_batches(start):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(
        jax, "block_until_ready", lambda tree, wait=jax.block_until_ready: time.sleep(busy) or wait(tree)
    )
    task = boxes(epochs=0.5)
    task.config.log.every_steps = 5
    loop.train(dataclasses.replace(task, train_batches=train_batches), tmp_path)
    steps = [record for record in records(tmp_path) if "train/wait_seconds" in record]
    assert len(steps) == 2
    waited = steps[1]["train/wait_seconds"]
    assert 0.04 < waited <= steps[1]["train/step_seconds"] if busy == 0 else waited < 0.02


def test_a_profile_of_some_steps(tmp_path):
    task = boxes(epochs=1.0)
    task.config.update_from_flattened_dict({"profile.start": 2, "profile.steps": 3})
    loop.train(task, tmp_path)
    (trace,) = (tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in found.planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [2, 3, 4]


def test_killed_and_resumed_it_ends_with_the_same_numbers(finished, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    for signum, step in ((signal.SIGKILL, 33), (signal.SIGTERM, 57)):
        program = f"import conftest, test_toy_task; test_toy_task.slow_run({str(tmp_path)!r}, {step})"
        run = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        assert run.stdout.readline() == b"there\n"
        run.send_signal(signum)
        run.communicate(timeout=120)
    assert 50 < max(record["step"] for record in records(tmp_path)) < 80
    assert loop.train(boxes(), tmp_path).totals == finished[1].totals
    ours, theirs = records(tmp_path), records(finished[0])
    assert len(ours) == len(theirs)
    for record, expected in zip(ours, theirs, strict=True):
        values = {name: value for name, value in expected.items() if "second" not in name}
        assert {name: record[name] for name in values} == values
