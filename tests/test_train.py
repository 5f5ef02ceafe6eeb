"""Whole runs: what they leave behind, how they end, and that a killed one ends as if it had not been."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2

import vitpyramid
from configs import quickstart
from soak import CHANGES, STEPS, Run, arrays, differing, wait_for_a_save
from vitpyramid import data
from vitpyramid.tasks import make_task
from vitpyramid.tools import preview, report
from vitpyramid.train import config as configs
from vitpyramid.train import loop
from vitpyramid.train.program import abstract_batch, build
from vitpyramid.train.report import NonFiniteError
from vitpyramid.train.sharding import make_mesh
from vitpyramid.weights import store
from vitpyramid.weights.intact import newest_intact

ROOT = Path(__file__).parent.parent


class Recording(ConfigDict):
    """A config that remembers which keys were read as attributes."""

    def __init__(self, plain, prefix="", reads=None):
        super().__init__()
        for key, value in plain.items():
            self[key] = Recording(value, f"{prefix}{key}.", reads) if isinstance(value, ConfigDict) else value
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_reads", reads)

    def __getattr__(self, name):
        value = super().__getattr__(name)
        self._reads.add(self._prefix + name)
        return value


def tiny_config(data_dir, **changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict({**CHANGES, "data.data_dir": data_dir, **changes})
    config.compile_cache = ""  # pytest's own is in use
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run on eight devices, the config keys it read, and what it called back with."""
    workdir = tmp_path_factory.mktemp("finished")
    reads, seen = set(), []
    config = Recording(tiny_config(data_dir), reads=reads)
    return workdir, loop.train(make_task(config), workdir, callback=seen.append), reads, seen


def test_a_run_leaves_everything_behind(finished):
    workdir, summary, _, seen = finished
    assert summary.step == summary.total_steps == STEPS
    assert summary.metrics["top1"] > 0.5
    assert {"loss", "top1", "top5", "ema_loss", "ema_top1", "ema_top5"} == set(summary.metrics)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["42", "44"]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 64
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/top1" in line] == [22, 44]
    assert seen == lines == summary.history
    best = max((line for line in lines if "eval/top1" in line), key=lambda line: line["eval/top1"])
    assert (summary.workdir, summary.best_step) == (workdir, best["step"])
    assert {f"eval/{name}": value for name, value in summary.best.items()} | {"step": best["step"]} == best
    train_keys = {"loss", "top1", "top5", "lr", "grad_norm", "images_per_second", "step_seconds"}
    assert {f"train/{key}" for key in train_keys} < set(lines[0])
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert tensorboard_tags(workdir) >= {"train/loss", "train/lr", "eval/top1", "eval/ema_top5"}


def tensorboard_tags(workdir):
    tags = set()
    for path in (workdir / "tensorboard").iterdir():
        content, position = path.read_bytes(), 0
        while position < len(content):  # records: uint64 length, crc, data, crc
            length = int.from_bytes(content[position : position + 8], "little")
            event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
            tags |= {value.tag for value in event.summary.value}
            position += 16 + length
    return tags


# What turns on the options that are off in `finished`, traced and not run.
OPTIONS = (
    {"optim.name": "adamp", "mix.mixup": 0.8, "mix.cutmix": 1.0, "erase.prob": 0.5, "ema.warmup": True},
    {"optim.name": "sgd", "optim.layer_decay": 0.9, "schedule.scale_ends": True, "schedule.per": "epoch"},
)


def traced(config):
    """Makes everything that a run of this config would use, and traces its training step."""
    task, mesh = make_task(config), make_mesh(config.mesh.fsdp)
    task.train_batches(0).close()
    task.eval_batches()
    task.initial()
    with jax.set_mesh(mesh):
        program = build(task, mesh)
        jax.eval_shape(program.train_step, program.state, abstract_batch(task, mesh), program.constants)


def test_every_key_is_read(finished, data_dir):
    """And one that nobody reads is found: all configs have the same keys (validate), so these show the dead ones."""
    workdir, _, reads, _ = finished
    entries = {
        "detect": {"schedule.name": "step", "optim.decay_vectors": True, "data.crop_short_side": (64,)},
        "segment": {"schedule.name": "poly", "data.crop": True},
    }
    for entry, changes in entries.items():
        config = quickstart.get_config(entry)
        config.update_from_flattened_dict({**changes, "data.train_split": "train[:80]", "eval.batch_size": 8})
        traced(Recording(config, reads=reads))
    for options in OPTIONS:
        config = tiny_config(data_dir, **options)
        config.init = config.distill.teacher = str(workdir)
        with config.unlocked():
            config.optim.dead = 1.0
        traced(Recording(config, reads=reads))
    assert set(configs.flatten(config)) - reads == {"optim.dead"}


def test_evaluation_counts_every_example_once(finished, data_dir):
    """Batch sizes that do and do not divide 360 examples give the same counts."""
    workdir, summary, *_ = finished
    for batch_size in (8, 64, 512):
        config = tiny_config(data_dir, **{"eval.batch_size": batch_size})
        step, metrics = loop.evaluate_checkpoint(make_task(config), workdir)
        assert step == STEPS
        for name in ("top1", "top5", "ema_top1"):
            assert metrics[name] * 360 == pytest.approx(round(summary.metrics[name] * 360), abs=1e-3)
        assert metrics["loss"] == pytest.approx(summary.metrics["loss"], rel=1e-5)


def test_a_finished_run_has_nothing_to_do(finished, data_dir, capsys):
    workdir, summary, *_ = finished
    seen = []
    again = vitpyramid.train(tiny_config(data_dir), str(workdir), callback=seen.append)
    assert again.metrics == pytest.approx(summary.metrics, rel=1e-5)
    assert (again.examples_per_second, again.best, seen) == (0, summary.best, [])
    assert "44 steps of 64 images (22 an epoch)" in capsys.readouterr().out


def test_a_report_looks_at_every_example(finished, data_dir, tmp_path):
    workdir, summary, *_ = finished
    task = make_task(tiny_config(data_dir, **{"eval.batch_size": 64}))
    found = report.examine(task, workdir, worst=3)
    assert found.metrics == pytest.approx(summary.metrics, rel=1e-5)
    assert (found.step, found.weights, found.names) == (STEPS, "ema", list("0123456789"))
    assert found.confusion.sum() == 360 and np.trace(found.confusion) / 360 == pytest.approx(
        summary.metrics["ema_top1"]
    )
    records = data.open_source(task.config.data, "test")
    assert found.confusion.sum(axis=1).tolist() == np.bincount([records[i]["label"] for i in range(360)]).tolist()
    assert [mistake.label for mistake in found.mistakes] == [records[m.index]["label"] for m in found.mistakes]
    own = [mistake.label_probability for mistake in found.mistakes]
    assert own == sorted(own) and all(m.probability >= m.label_probability for m in found.mistakes)
    text = report.write(found, tmp_path / "report")
    assert task.words(summary.metrics) in text
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert sum(row["correct"] for row in saved["classes"]) == np.trace(found.confusion)
    assert [row["place"] for row in saved["mistakes"]] == [records.where(m.index) for m in found.mistakes]
    rows = (tmp_path / "report" / "confusion.csv").read_text().splitlines()
    assert rows[1].split(",")[1:] == [str(count) for count in found.confusion[0]]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "confusion.csv", "confusion.png", "mistakes.png", "report.json"
    ]  # fmt: skip


def test_restores_on_another_mesh(finished):
    workdir, *_ = finished
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    expected = arrays(workdir)
    with store.open_checkpoints(workdir, read_only=True) as manager:
        state = store.restore(manager, STEPS, build(make_task(config), make_mesh(8)).state)
    assert not state.params["block4_0"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        np.testing.assert_array_equal(
            np.asarray(leaf), expected[jax.tree_util.keystr(path, simple=True, separator="/")]
        )


def test_another_config_is_refused(finished, data_dir):
    workdir, *_ = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(configs.ConfigError, match=re.escape("optim.lr: 0.001 -> 0.5")) as error:
        loop.train(make_task(tiny_config(data_dir, **{"optim.lr": 0.5})), workdir)
    assert "--allow_config_change" in str(error.value)
    assert (workdir / "config.json").read_text() == before
    with pytest.raises(configs.ConfigError, match=r"epochs = 1.0: expected 44 steps or more"):
        loop.train(make_task(tiny_config(data_dir, epochs=1.0)), workdir, allow_config_change=True)
    with pytest.raises(configs.ConfigError, match="examples in data.train_split: 1437 -> 719"):
        loop.train(make_task(tiny_config(data_dir, **{"data.train_split": "train[:719]"})), workdir)
    with pytest.raises(configs.ConfigError, match="model.drop_rate|image_size"):
        loop.evaluate_checkpoint(make_task(tiny_config(data_dir, **{"data.image_size": 64})), workdir)


def test_half_a_checkpoint_is_not_picked_up(finished, tmp_path):
    workdir, *_ = finished
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "44").symlink_to(workdir / "checkpoints" / "44")
    (folder / "99.orbax-checkpoint-tmp").mkdir()
    with store.open_checkpoints(tmp_path, read_only=True) as manager:
        assert manager.latest_step() == 44


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 7}, "model.num_classes = 7: expected 10"),
        ({"data.eval_split": "validation"}, "validation"),
        ({"data.name": "no_such_data"}, "no_such_data"),
    ],
)
def test_data_that_does_not_fit(changes, message, data_dir, tmp_path):
    with pytest.raises(configs.ConfigError, match=re.escape(message)):
        loop.train(make_task(tiny_config(data_dir, **changes)), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_nothing_to_evaluate(data_dir, tmp_path):
    with pytest.raises(configs.ConfigError, match="complete checkpoint"):
        loop.evaluate_checkpoint(make_task(tiny_config(data_dir)), tmp_path)


def test_non_finite_loss_stops_the_run(data_dir, tmp_path, monkeypatch):
    """Weights turn NaN before step 9: the run names that step and leaves the checkpoint of step 6 alone."""
    original = loop.compile_train_step

    def poisoned(task, program, mesh):
        step = original(task, program, mesh)

        def train_step(state, batch, constants):
            if int(state.step) == 8:
                state = state.replace(params=jax.tree.map(lambda p: p * float("nan"), state.params))
            return step(state, batch, constants)

        return train_step

    monkeypatch.setattr(loop, "compile_train_step", poisoned)
    config = tiny_config(data_dir, **{"log.every_steps": 5})
    with pytest.raises(NonFiniteError, match=r"step 9: loss nan") as error:
        loop.train(make_task(config), tmp_path)
    assert "'loss': " in str(error.value)
    assert f"{tmp_path}/checkpoints/6" in str(error.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_killed_runs_end_as_uninterrupted_ones(tmp_path, data_dir):
    """SIGKILL in the middle of a step and in the middle of a save, SIGTERM, SIGINT: the same bits at the end."""
    seed = int(time.time())  # other moments in every run of the tests
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    cache = tmp_path / "cache"
    whole = Run(tmp_path / "whole", data_dir, cache)
    assert whole.end() == 0, whole.output

    workdir = tmp_path / "killed"
    run = Run(workdir, data_dir, cache)
    assert run.until(rf"step +{rng.integers(7, 16)}/{STEPS} "), run.output
    assert run.stop(signal.SIGKILL) == -signal.SIGKILL

    run = Run(workdir, data_dir, cache)
    assert run.until(r"going on from step|from the start"), run.output  # the first save may not have been complete
    wait_for_a_save(workdir, run.process)
    assert run.stop(signal.SIGKILL) == -signal.SIGKILL, run.output

    for signum in (signal.SIGTERM, signal.SIGINT):
        run = Run(workdir, data_dir, cache)
        assert run.until(r"going on from step|from the start"), run.output
        assert run.until(r"step +\d+/"), run.output
        assert run.stop(signum) == 75, run.output
        step = int(re.search(r"stopped +after step (\d+)", run.output).group(1))
        assert newest_intact(workdir / "checkpoints") == step < STEPS

    run = Run(workdir, data_dir, cache)
    assert run.end() == 0, run.output
    assert f"going on from step {step}" in run.output
    assert differing(arrays(workdir), arrays(tmp_path / "whole")) == []
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/loss" in line] == [22, 44]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/nothing.py"], "--config 'configs/nothing.py': no such file; with the package come deit.py"),
        (["--config", "nothing.py"], "--config 'nothing.py': no such file"),
        (["--config=quickstart.py", "--config.optim.speed=1"], "--config has no key 'optim.speed'"),
        (["--config=quickstart.py", "--config.epochs=abc"], "--config.epochs=abc"),
        (["--config=pvt.py:huge"], "'huge' is no variant; expected one of tiny, small"),
        (["--config=pvt.py:tiny,finetun=384"], "'finetun=384' is no option; expected finetune=SIZE"),
        (["--config=quickstart.py", "--config.lr=1"], "has no key 'lr'; did you mean optim.lr?"),
        (["--config=quickstart.py", "--config.epochs=inf"], "the config cannot be run:\n  epochs = inf: expected more"),
    ],
)
def test_bad_configs_of_a_tool(args, message, capsys):
    with pytest.raises(SystemExit):
        preview.main(args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--wokdir=x"], "no such argument: --wokdir; did you mean workdir?"),
        (["--report"], "--report goes with --mode=eval, not with --mode=train"),
        (
            ["--config.epochs=inf", "--config.data.auto_augment=foo", "--config.batch_size=-8", "--mode=eval"],
            "the config cannot be run:\n  batch_size = -8: expected at least 1",
        ),
    ],
)
def test_bad_command_lines(args, message, tmp_path):
    command = [sys.executable, ROOT / "main.py", f"--workdir={tmp_path}", *args]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config(:\n", "--config: invalid syntax (mine.py, line 1)"),
        ("def get_config():\n    return nothing\n", "mine.py, line 2: NameError: name 'nothing' is not defined"),
        ("from configs.mine import base\n", "mine.py, line 1: ModuleNotFoundError: No module named 'configs.mine'"),
    ],
)
def test_a_config_file_that_does_not_run(program, message, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(program)
    with pytest.raises(SystemExit):
        preview.main([f"--config={file}"])
    assert message in capsys.readouterr().err
