"""vitpyramid.data.open_source: digits, prepared sets by name, splits, and what cannot be opened."""

import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from streams import make_config, run_python
from vitpyramid.data import open_source
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
        ("tiny_scans:9.9.9", "train", ["data.name", "'tiny_scans:9.9.9'", "data.data_dir", ":VERSION", "only: 1.0.0"]),
        ("tiny_scans/half", "train", ["data.name", "'tiny_scans/half'", "/CONFIG", "BuilderConfig half not found"]),
        ("no set", "train", ["data.name", "'no set'", "NAME", "Parsing builder name string no set failed"]),
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


@pytest.mark.parametrize("name", ["tiny_scans", "digits", "own_set"])
@pytest.mark.parametrize("content", [b"", b'{"name": "tiny', b"[7]", b'{"splits": 7}', b"\xff"])
def test_a_damaged_dataset_info_is_told_in_a_line(data_dir, tmp_path, name, content):
    shutil.copytree(data_dir / "tiny_scans", tmp_path / name)
    (tmp_path / name / "1.0.0" / "dataset_info.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_source(make_config(tmp_path, **{"data.name": name}).data, "train")
    start = rf"data\.name / data\.data_dir: cannot open '{name}' in '{tmp_path}', expected "
    assert re.fullmatch(start + r".*dataset_info.json .*\(.+\)", str(error.value))


@pytest.mark.parametrize("name", ["imagenet2012", "digits", "folder"])
def test_a_missing_package_is_told_in_a_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    expected = r"data\.data_dir: gs://bucket/sets: expected gcsfs: pip install 'vitpyramid\[gcs\]'"
    with pytest.raises(ValueError, match=expected):
        open_source(make_config("gs://bucket/sets", **{"data.name": name}).data, "train")
