"""vitpyramid.tools.benchmark and the config arguments of the tools."""

import time

import pytest

from configs import quickstart
from vitpyramid.data import augment
from vitpyramid.tools import benchmark


@pytest.fixture
def config(data_dir):
    config = quickstart.get_config()
    config.data.data_dir = data_dir
    config.data.threads = 1
    config.data.auto_augment = "rand-m9-mstd0.5-inc1"
    config.batch_size = 8
    return config


def busy(seconds, function):
    """`function`, made slower by so much CPU time."""

    def slow(*args):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return function(*args)

    return slow


def test_rates_are_of_the_steps_they_name(config, monkeypatch):
    monkeypatch.setattr(augment, "decode", busy(0.004, augment.decode))
    monkeypatch.setattr(augment, "train_image", busy(0.01, augment.train_image))
    rates = {rate.name: 1 / rate.per_core for rate in benchmark.data_rates(config, seconds=0.05)}
    assert list(rates) == [
        "read", "decode", "decode, crop", "decode, crop, augment", "batches", "batches on the devices"
    ]  # fmt: skip
    assert rates["read"] < 0.004  # seconds an image
    assert 0.004 <= rates["decode"] < 0.01
    for name in ("decode, crop", "decode, crop, augment", "batches", "batches on the devices"):
        assert 0.01 <= rates[name] < 0.02, name


def test_time_without_work_is_not_counted():
    rate = benchmark._rate("sleep", lambda i: time.sleep(0.005), seconds=0.1, images=3)
    assert rate.wall <= 600  # a sleep is never shorter than asked for
    assert rate.per_core > 2 * rate.wall


def test_policy_is_left_out_of_the_plain_crop(config, monkeypatch):
    seen = []
    original = augment.train_image
    monkeypatch.setattr(augment, "train_image", lambda *args: seen.append(args[2]) or original(*args))
    names = [rate.name for rate, _ in zip(benchmark.data_rates(config, seconds=0.01), range(4), strict=False)]
    assert names[2:] == ["decode, crop", "decode, crop, augment"]
    assert seen[0].policy is None and seen[0].flip == 0 and seen[-1].policy is not None


def test_cores_needed():
    rate = benchmark.Rate("batches", per_core=450.0, wall=1.0)
    assert benchmark.cores_needed(rate, chips=32, images_per_second_per_chip=1500) == 107  # 106.7
    assert benchmark.cores_needed(rate, chips=1, images_per_second_per_chip=450) == 1


def test_command(data_dir, capsys):
    config = ["--config=configs/quickstart.py", f"--config.data.data_dir={data_dir}", "--config.batch_size=16"]
    benchmark.main(["data", *config, "--seconds=0.01", "--chips=4", "--images_per_second_per_chip=100"])
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert rows[0].startswith("digits: JPEG by ") and len(rows) == 9 and "6 of 6" in err
    per_core = float(rows[7].split()[4])
    needed = int(rows[8].split("need ")[1].split()[0])
    assert rows[7].startswith("batches on the devices") and abs(needed - 400 / per_core) <= 1 + 1 / per_core


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected --config=FILE"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/pvt.py:huge"], "huge"),
        (["--config=configs/quickstart.py", "--config.data.nme=x"], "no key 'data.nme'"),
        (["--config=configs/quickstart.py", "--config.batch_size=x"], "batch_size"),
        (["--config=configs/quickstart.py", "--chip=3"], "no such argument: --chip"),
        (["--config=configs/quickstart.py", "more"], "unexpected arguments ['more']"),
        (["--config=configs/quickstart.py", "--config.data.auto_augment=rand-x"], "data.auto_augment = 'rand-x'"),
        (["--config=configs/quickstart.py", "--config.data.name=nothing"], "data.name"),
    ],
)
def test_command_refuses(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["data", *args, "--seconds=0.01"])
    assert caught.value.code == 2 and message in capsys.readouterr().err
