"""vitpyramid.data: the sources and the batch streams; the transforms are in test_augment.py."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from streams import assert_same, make_config, memory, side_by_side, take
from vitpyramid.data import augment, make_eval, make_train, open_source
from vitpyramid.data.digits import Digits


class TinyScans(Digits):
    """A set that TFDS finds by name, like imagenet2012; the same images as digits."""


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Prepared, but no image classification."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": iter([(0, {"text": "no image"})])}

    def _generate_examples(self):
        raise NotImplementedError


def run_python(*arguments):
    """Runs another interpreter that, from any directory and in its workers, imports this checkout."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    open_source(make_config(path).data, "train")
    for builder in (TinyScans(data_dir=path), TinyText(data_dir=path)):
        builder.download_and_prepare(file_format="array_record")
    return path


# Digits


def test_digits_equals_scikit_learn(data_dir):
    digits = sklearn.datasets.load_digits()
    scans = np.rint(digits.data / 16 * 255).astype(np.uint8)
    expected = sorted((scan.tobytes(), label) for scan, label in zip(scans, digits.target, strict=True))
    found = []
    for split, count in ("train", 1437), ("test", 360):
        source = open_source(make_config(data_dir).data, split)
        assert (len(source), source.num_classes, source.split) == (count, 10, split)
        found += [
            (np.asarray(Image.open(io.BytesIO(source[i]["image"]))).tobytes(), source[i]["label"]) for i in range(count)
        ]
    assert sorted(found) == expected  # every scan once over both splits, so they are disjoint


def test_digits_split_is_stratified(data_dir):
    per_class = np.bincount(sklearn.datasets.load_digits().target)
    source = open_source(make_config(data_dir).data, "test")
    counts = np.bincount([source[i]["label"] for i in range(len(source))])
    assert np.all(np.abs(counts - per_class * 360 / 1797) < 1)


def test_digits_killed_while_preparing_is_prepared_again(tmp_path):
    code = """
        import os, signal, sys
        from types import SimpleNamespace
        from vitpyramid.data import open_source
        from vitpyramid.data.digits import Digits
        def examples(self, images, labels, indices, generate=Digits._generate_examples):
            for number, example in enumerate(generate(self, images, labels, indices)):
                if len(indices) == 360 and number == 100:  # `train` is complete on disk, `test` is not
                    os.kill(os.getpid(), signal.SIGKILL)
                yield example
        Digits._generate_examples = examples
        open_source(SimpleNamespace(name="digits", data_dir=sys.argv[1]), "train")
    """
    killed = run_python("-c", textwrap.dedent(code), tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any("train.array_record" in file for _, _, files in os.walk(tmp_path) for file in files)
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(open_source(make_config(tmp_path).data, "test")) == 360


def test_digits_prepared_by_two_processes_at_once(tmp_path, monkeypatch):
    config, generate, inner = make_config(tmp_path), Digits._generate_examples, []

    def examples(self, *args):
        if not inner:  # while this one prepares, another one starts and completes
            inner.append(None)
            inner[0] = len(open_source(config.data, "train"))
        yield from generate(self, *args)

    monkeypatch.setattr(Digits, "_generate_examples", examples)
    outer = open_source(config.data, "train")
    assert (inner, len(outer), outer[1436]["label"] in range(10)) == ([1437], 1437, True)
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


# Sources


def test_any_prepared_builder_opens_by_name(data_dir):
    source = open_source(make_config(data_dir, **{"data.name": "tiny_scans"}).data, "train")
    assert (len(source), source.num_classes, type(source[0]["image"]), type(source[0]["label"])) == (
        1437,
        10,
        bytes,
        int,
    )


def test_sub_splits_partition_the_split(data_dir):
    config = make_config(data_dir).data
    whole, head, tail = (open_source(config, split) for split in ("train", "train[:99%]", "train[99%:]"))
    assert (len(head), len(tail)) == (1423, 14)
    assert [whole[i] for i in range(1437)] == [s[i] for s in (head, tail) for i in range(len(s))]


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("digits", "validation", ["data.train_split", "data.eval_split", "'validation'", "'test', 'train'"]),
        ("digits", "train[:0%]", ["data.train_split", "'train[:0%]'"]),
        ("digits", "train[", ["data.train_split", "'train['"]),
        ("no_such_set", "train", ["data.name", "'no_such_set'", "data.data_dir"]),
        ("imagenet2012", "train", ["data.name", "data.data_dir", "tfds build imagenet2012 --file_format=array_record"]),
        ("tiny_text", "train", ["data.name", "'tiny_text'", "'image'", "'label'"]),
    ],
)
def test_open_source_errors_say_what_to_change(data_dir, name, split, words):
    with pytest.raises(ValueError) as error:
        open_source(make_config(data_dir, **{"data.name": name}).data, split)
    assert [word for word in words if word not in str(error.value)] == []


def test_not_prepared_names_the_directory(tmp_path):
    with pytest.raises(ValueError, match=f"--data_dir={tmp_path}"):
        open_source(make_config(tmp_path, **{"data.name": "imagenet2012"}).data, "train")


def test_other_formats_are_refused_with_the_conversion(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny_scans", tmp_path / "tiny_scans")
    info = tmp_path / "tiny_scans" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "parquet"}))
    with pytest.raises(ValueError, match=r"parquet.*\n.*tfds convert_format --dataset_version_dir=.*array_record"):
        open_source(make_config(tmp_path, **{"data.name": "tiny_scans"}).data, "train")


# Training stream


def test_every_epoch_is_a_fresh_permutation():
    source = memory(13)  # not a multiple of the batch size: batches straddle epochs
    labels = np.concatenate([batch["label"] for batch in take(make_train(make_config(), source), 13)])
    epochs = labels.reshape(8, 13)
    assert [sorted(epoch) for epoch in epochs] == [list(range(13))] * 8
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_train_batch_shapes_and_dtypes():
    config = make_config(**{"data.image_size": (6, 9)})
    [batch] = take(make_train(config, memory(13), process_count=2), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 6, 9, 3), np.uint8),
        "label": ((4,), np.int32),
    }


def test_the_same_image_is_augmented_anew_each_epoch():
    batches = take(make_train(make_config(batch_size=1), memory(1)), 8)
    assert len({batch["image"].tobytes() for batch in batches}) == 8


def test_the_seed_decides_order_and_crops():
    one, same, other = (take(make_train(make_config(seed=seed), memory(13)), 2) for seed in (0, 0, 1))
    assert_same(one, same)
    assert not np.array_equal(one[0]["label"], other[0]["label"])
    single = [take(make_train(make_config(seed=seed, batch_size=1), memory(1)), 1)[0]["image"] for seed in (0, 1)]
    assert not np.array_equal(*single)


@pytest.mark.parametrize("hosts", [1, 2])
def test_start_step_equals_skipping(hosts):
    config, source = make_config(), memory(13)
    for host in range(hosts):
        straight = take(make_train(config, source, 0, host, hosts), 9)
        assert_same(take(make_train(config, source, 5, host, hosts), 4), straight[5:])


def test_start_step_costs_nothing():
    batch = take(make_train(make_config(), memory(13), start_step=10**12), 1)[0]  # reading up to it would take years
    assert batch["label"].shape == (8,)


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 2), (8, 4), (96, 2), (74, 2)])
def test_hosts_side_by_side_are_one_host(batch_size, hosts):
    config, source = make_config(batch_size=batch_size), memory(13)
    shares = [take(make_train(config, source, 2, host, hosts), 3) for host in range(hosts)]
    assert_same(side_by_side(shares), take(make_train(config, source, 2), 3))


@pytest.mark.parametrize("batch_size", [1, 8, 37, 96])
def test_batch_size_only_cuts_the_stream(batch_size):
    order = grain.MapDataset.range(13).seed(3).shuffle().repeat()  # pinned: a resumed run must find its order again
    labels = np.concatenate([b["label"] for b in take(make_train(make_config(batch_size=batch_size), memory(13)), 3)])
    np.testing.assert_array_equal(labels, [order[i] for i in range(3 * batch_size)])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_matter(threads):
    source = memory(13)
    batches = take(make_train(make_config(batch_size=96, **{"data.threads": threads}), source), 3)
    assert_same(batches, take(make_train(make_config(batch_size=96), source), 3))


def test_workers_do_not_matter(data_dir):
    keys = {"batch_size": 96, "eval.batch_size": 96}
    plain, workers = make_config(data_dir, **keys), make_config(data_dir, **keys, **{"data.workers": 2})
    source = open_source(plain.data, "train[:200]")
    assert_same(take(make_train(workers, source, 1), 4), take(make_train(plain, source, 1), 4))
    assert_same(list(make_eval(workers, source)), list(make_eval(plain, source)))


# Evaluation


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (13, 1), (5, 1), (16, 1), (12, 2), (4, 4), (12, 4), (40, 2)])
def test_eval_covers_every_example_once(batch_size, hosts):
    config, source = make_config(**{"eval.batch_size": batch_size}), memory(13)
    shares = [make_eval(config, source, host, hosts) for host in range(hosts)]
    assert {len(share) for share in shares} == {math.ceil(13 / batch_size)}
    batches = side_by_side([list(share) for share in shares])
    assert len(batches) == len(shares[0])
    flat = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert all(len(value) == len(batches) * batch_size for value in flat.values())
    assert flat["mask"].dtype == bool and flat["label"].dtype == np.int32
    np.testing.assert_array_equal(flat["label"][flat["mask"]], np.arange(13))
    np.testing.assert_array_equal(np.flatnonzero(flat["mask"]), np.arange(13))
    for index in range(13):
        image = augment.eval_crop(augment.decode(source[index]["image"]), 8, 0.875)
        np.testing.assert_array_equal(flat["image"][index], np.asarray(image))


def test_eval_can_be_walked_again_even_when_left_early():
    batches = make_eval(make_config(), memory(13))
    for _ in batches:
        break
    assert_same(list(batches), list(batches))
    assert [int(batch["mask"].sum()) for batch in batches] == [8, 5]


# Errors and endings


@pytest.mark.parametrize("make", [make_train, make_eval])
def test_a_damaged_record_is_named(make):
    source = memory(13)
    source.records[7] = source.records[7][:60]
    batches = iter(make(make_config(), source))
    with pytest.raises(ValueError, match=r"'memory', split 'train', index 7 \(record 7\): not a readable image"):
        take(batches, 2)
    assert list(batches) == []  # it does not go on with shifted batches


@pytest.mark.parametrize(("make", "key"), [(make_train, "batch_size"), (make_eval, "eval.batch_size")])
def test_batch_size_must_divide_by_hosts(make, key):
    with pytest.raises(ValueError, match=f"^{key}: 8 .* 3"):
        make(make_config(), memory(13), process_index=0, process_count=3)
    with pytest.raises(ValueError, match="process_index 2"):
        make(make_config(), memory(13), process_index=2, process_count=2)


def test_a_closed_stream_has_ended():
    stream = make_train(make_config(), memory(13))
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_exit_is_quiet_and_tensorflow_stays_out(data_dir, tmp_path, workers):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from ml_collections import ConfigDict
        from vitpyramid.data import make_eval, make_train, open_source
        if __name__ == "__main__":  # workers import this file
            data = dict(name="digits", data_dir=sys.argv[1], train_split="train", eval_split="test", image_size=16,
                        crop_scale=(.3, 1), crop_ratio=(.75, 1.33), flip=.5, eval_crop=1., threads=2,
                        repeats=3, on_corrupt="skip", workers=int(sys.argv[2]), auto_augment="",
                            color_jitter=0., crop_padding=0, interpolation="bicubic", eval_interpolation="bicubic")
            config = ConfigDict(dict(seed=0, batch_size=32, eval=dict(batch_size=100), data=data))
            stream = make_train(config, open_source(config.data, "train"))
            batch, other = next(stream), next(stream)
            evaluation = iter(make_eval(config, open_source(config.data, "test")))
            mask = next(evaluation)["mask"]
            print(mask.sum(), "tensorflow" in sys.modules)  # and leaves with everything open
        """)
    )
    done = run_python(script, data_dir, workers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "100 False\n", "")
