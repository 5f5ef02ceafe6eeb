"""vitpyramid.tools.export, throughput and runs, on networks that compile in no time."""

import json
import re

import jax
import numpy as np
import pytest

import harness
import toy_family
from vitpyramid.models import registry
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.tools import export, runs, throughput
from vitpyramid.weights.store import write_weights


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(registry, "VARIANTS", registry.VARIANTS | toy_family.VARIANTS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights of a toy, and these."""
    folder, variables = (
        tmp_path_factory.mktemp("weights"),
        harness.random_variables(toy_family.VARIANTS["toy_thin"].model),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "VARIANTS", registry.VARIANTS | toy_family.VARIANTS)
        write_weights(folder, {"name": "toy_thin", "num_classes": 10, "image_size": 32}, variables)
    return folder, variables


def test_an_export_is_the_network(weights, tmp_path, capsys):
    """Any number of images, pixels in; one size of batch, floats in, for a device that is not here."""
    folder, variables = weights
    out = tmp_path / "toy.stablehlo"
    assert export.main([str(folder), f"--out={out}", "--pixels", "--platforms=cpu,tpu"]) == 0
    assert "toy_thin for any number of images of 32 x 32, uint8 pixels, on cpu, tpu" in capsys.readouterr().out
    pixels = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    variant = get_variant("toy_thin")
    images = ((pixels / 255 - np.array(variant.mean)) / np.array(variant.std)).astype(np.float32)
    expected = harness.apply(create_model("toy_thin"), variables, images)
    exported = jax.export.deserialize(bytearray(out.read_bytes()))
    np.testing.assert_allclose(exported.call(pixels), expected, rtol=1e-4, atol=1e-5)
    assert exported.platforms == ("cpu", "tpu")
    assert export.main([str(folder), f"--out={out}", "--batch=5", "--platforms=tpu"]) == 0
    assert "normalised float32, on tpu\n" in (text := capsys.readouterr().out) and "not run here" in text
    (taken,) = jax.export.deserialize(bytearray(out.read_bytes())).in_avals
    assert (taken.shape, taken.dtype) == ((5, 32, 32, 3), np.float32)


def test_what_is_read_back_must_be_equal(weights, tmp_path, monkeypatch):
    class Other:
        def call(self, images):
            return np.ones((len(images), 10))

    monkeypatch.setattr(export.jax_export, "deserialize", lambda content: Other())
    with pytest.raises(ValueError, match="logits differ by"):
        export.export(create_model("toy_thin"), weights[1], tmp_path / "toy", batch=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--platforms=cpu,npu"], "platforms: npu: expected some of cpu, cuda, rocm, tpu"),
        (["--out=nowhere/toy"], "there is no folder nowhere"),
        (["--size=8"], "H and W at least 16"),
        (["--batch=0"], "expected an integer of at least 1"),
    ],
)
def test_export_refuses(args, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([str(weights[0]), "--out=toy", *args]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_throughput_is_measured_by_batch(capsys):
    throughput.main(["toy_thin", "--batches=4,1", "--seconds=0.05", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["model"], row["batch"], row["dtype"]) for row in rows] == [("toy_thin", n, "float32") for n in (1, 4)]
    images = 4 * 32 * 32 * 3 * 4
    for row in rows:
        assert row["images_per_second"] > 0 and row["latency"] > 0
    assert 0.7 * images < rows[1]["memory"] - 4 * toy_family.VARIANTS["toy_thin"].params < 10 * images
    row = throughput.describe(throughput.Rate(**rows[1]))
    assert row.split()[:5] == ["toy_thin", "32x32", "float32", "-", "4"] and len(throughput.HEADER) == len(row)


def test_throughput_counts_what_it_ran():
    calls = []
    rate, latency = throughput._measure(lambda: calls.append(0) or np.zeros(1), batch=8, seconds=0.02)
    assert rate > 8 and latency > 0 and len(calls) > 2 * throughput._LEAST


def test_a_batch_that_does_not_fit_is_the_last(monkeypatch, capsys):
    def measure(run, batch, seconds):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(throughput, "_measure", measure)
    throughput.main(["toy_thin", "--batches=2,4"])
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.split()[4] == "2" and row.endswith("does not fit into the device's memory")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["toy"], None),
        (["PVT-Small"], "no model is called 'PVT-Small'; expected one of list_models(), such as pvt_small"),
        (["toy_thin", "--batches=1,x"], "'1,x': expected numbers of images"),
    ],
)
def test_throughput_refuses(args, message, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "throughput", lambda *args: [])
    if message is None:
        return throughput.main(args)
    with pytest.raises(SystemExit):
        throughput.main(args)
    assert message in capsys.readouterr().err


def make_run(folder, top1, **keys):
    folder.mkdir(parents=True)
    config = {"task": "classify", "seed": 0, "optim": {"lr": 0.1}, "data": {"data_dir": str(folder)}, **keys}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": 5, "train/loss": 1.0, "train/images_per_second": 99.6}]
    lines += [{"step": 10 * n, "eval/top1": value, "eval/loss": 1 - value} for n, value in enumerate(top1, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "ev')


def test_runs_are_compared(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "a", [0.5, 0.25])
    make_run(tmp_path / "runs" / "deep" / "b", [0.125, 0.75], optim={"lr": 0.2}, more=(1, 2))
    make_run(tmp_path / "runs" / "c", [])
    monkeypatch.chdir(tmp_path)
    runs.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run", "step", "best", "at", "last", "metric", "images/s"],
        ["1", "runs/deep/b", "20", "75.00%", "20", "75.00%", "top1", "100"],
        ["2", "runs/a", "20", "50.00%", "10", "25.00%", "top1", "100"],
        ["3", "runs/c", "5", "-", "-", "-", "top1", "100"],
        [],
        ["1", "2", "3"],
        ["more", "[1,", "2]", "-", "-"],
        ["optim.lr", "0.2", "0.1", "0.1"],
    ]
    runs.main(["runs", "--metric=loss", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(run["path"], run["best"], run["best_step"]) for run in found] == [
        ("runs/deep/b", 0.25, 20), ("runs/a", 0.5, 10), ("runs/c", None, None)
    ]  # fmt: skip
    assert found[0]["config"]["optim.lr"] == 0.2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "nothing: expected a folder with config.json"),
        (["run", "--metric=ap"], "run: no metric 'ap' in its evaluations; expected one of loss, top1"),
        (["bad"], "config.json: "),
    ],
)
def test_runs_refuses(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [0.5])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        runs.main(args)
    assert re.search(re.escape(message), capsys.readouterr().err)
