"""TFDS data sets on disk, ArrayRecord and TFRecord: the real `imagenet2012` builder and one of our own."""

import concurrent.futures
import io
import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorboardX.record_writer import RecordWriter

from streams import assert_same, make_config, noise, take
from vitpyramid.data import make_train, open_source, tfrecord
from vitpyramid.data.digits import Digits
from vitpyramid.tools.classes import saved_names

SHARDS = {"train": [7, 0, 5, 8], "validation": [6]}
FORMATS = ["array_record", "tfrecord"]


class TinyRecords(Digits):
    """A set that TFDS finds by name; the same images as digits, to be rewritten as TFRecord."""


def write_shard(path, records, file_format):
    # Another implementation of the TFRecord format than ours: the one that TensorBoard files are written with.
    writer = RecordWriter(str(path)) if file_format == "tfrecord" else ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_splits(builder, file_format, shards):
    """Writes serialised examples, `shards[split]` a list of lists, as TFDS lays out a prepared set."""
    infos = []
    for split, files in shards.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=builder.name, data_dir=builder.data_path, filetype_suffix=file_format, split=split
        )
        lengths = [len(records) for records in files]
        infos.append(tfds.core.SplitInfo(split, lengths, num_bytes=0, filename_template=template))
        for shard, records in enumerate(files):
            write_shard(template.sharded_filepath(shard_index=shard, num_shards=len(files)), records, file_format)
    builder.info.set_file_format(file_format, override=True)
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(builder.data_path)


def jpegs(count):
    images = []
    for png in noise(count):
        with io.BytesIO() as file:
            Image.open(io.BytesIO(png)).resize((50, 40)).save(file, "jpeg")
            images.append(file.getvalue())
    return images


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet in both formats, in folders named after them, and its examples by split."""
    root, images, examples = tmp_path_factory.mktemp("imagenet"), iter(jpegs(26)), {}
    for split, lengths in SHARDS.items():
        examples[split] = [{"image": next(images), "label": 37 * i % 1000} for i in range(sum(lengths))]
    for file_format in FORMATS:
        builder = tfds.builder("imagenet2012", data_dir=root / file_format)
        builder.data_path.mkdir(parents=True)
        shards, features = {}, builder.info.features
        for split, lengths in SHARDS.items():
            names = [f"n{i:08d}.JPEG" for i in range(len(examples[split]))]
            encoded = [
                features.serialize_example(features.encode_example(example | {"file_name": name}))
                for example, name in zip(examples[split], names, strict=True)
            ]
            ends = np.cumsum(lengths)
            shards[split] = [encoded[end - n : end] for n, end in zip(lengths, ends, strict=True)]
        write_splits(builder, file_format, shards)
    return root, examples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the indices."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    return tmp_path / "cache" / "vitpyramid" / "tfrecord"


@pytest.fixture
def copied(imagenet, tmp_path):
    """A copy of `imagenet` that may be damaged."""
    return Path(shutil.copytree(imagenet[0], tmp_path / "copied"))


def open_imagenet(root, file_format, split="train", **keys):
    return open_source(make_config(root / file_format, **{"data.name": "imagenet2012", **keys}).data, split)


def shard_path(root, file_format, shard):
    return root / file_format / "imagenet2012" / "5.1.0" / f"imagenet2012-train.{file_format}-{shard:05d}-of-00004"


def contents(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("file_format", FORMATS)
def test_imagenet_opens(imagenet, file_format):
    root, examples = imagenet
    for split in SHARDS:
        source = open_imagenet(root, file_format, split)
        assert (len(source), source.num_classes) == (sum(SHARDS[split]), 1000)
        assert contents(source) == examples[split]
        assert source.class_names[951] == "n07749582"
    assert saved_names({"about": {"classes": list(source.class_names)}})[951] == "lemon"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:8]", slice(8)),
        ("train[-3:]", slice(17, 20)),
        ("train[25%:70%]", slice(5, 14)),
        ("train[2shard:]", slice(7, 20)),
    ],
)
def test_sub_splits(imagenet, file_format, split, expected):
    root, examples = imagenet
    assert contents(open_imagenet(root, file_format, split)) == examples["train"][expected]
    both = contents(open_imagenet(root, file_format, f"validation+{split}"))
    assert both == examples["validation"] + examples["train"][expected]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("split", ["train[5:5]", "train[90%:10%]"])
def test_empty_sub_splits_are_refused(imagenet, file_format, split):
    with pytest.raises(ValueError, match=r"data\.train_split / data\.eval_split: .* is empty"):
        open_imagenet(imagenet[0], file_format, split)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_record_says_where_it_lies(imagenet, file_format):
    source = open_imagenet(imagenet[0], file_format, "train[3:]")
    assert source.where(0).startswith(f"{shard_path(imagenet[0], file_format, 0)}, record 3")
    assert source.where(4).startswith(f"{shard_path(imagenet[0], file_format, 2)}, record 0")
    for index in -1, 17:
        with pytest.raises(IndexError):
            source.where(index)


@pytest.mark.parametrize("file_format", FORMATS)
def test_sources_travel_to_workers(imagenet, file_format):
    source = open_imagenet(imagenet[0], file_format)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_both_formats_give_the_same_batches(imagenet):
    config = make_config()
    streams = [make_train(config, open_imagenet(imagenet[0], file_format)) for file_format in FORMATS]
    assert_same(*(take(stream, 3) for stream in streams))


def edit_info(root, file_format, **entries):
    info = root / file_format / "imagenet2012" / "5.1.0" / "dataset_info.json"
    entries = json.loads(info.read_text()) | entries
    info.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


@pytest.mark.parametrize(("first", "second"), [FORMATS, FORMATS[::-1]])
def test_a_set_in_both_formats(imagenet, copied, first, second):
    """What `tfds convert_format` leaves in one folder; ArrayRecord needs no index."""
    for shard in (copied / second).rglob(f"*.{second}*"):
        shutil.copy(shard, copied / first / "imagenet2012" / "5.1.0")
    edit_info(copied, first, alternativeFileFormats=[second])
    source = open_imagenet(copied, first)
    assert "array_record-00000" in source.where(0)
    assert contents(source) == imagenet[1]["train"]


def test_a_set_of_the_time_when_there_was_only_tfrecord(imagenet, copied):
    edit_info(copied, "tfrecord", fileFormat=None)
    assert contents(open_imagenet(copied, "tfrecord")) == imagenet[1]["train"]


def test_a_builder_of_our_own_as_tfrecord(tmp_path):
    builder = TinyRecords(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    config = make_config(tmp_path, **{"data.name": "tiny_records"}).data
    expected = open_source(config, "test")
    records = [expected.records.examples[i] for i in range(360)]
    shutil.rmtree(builder.data_path)
    builder = TinyRecords(data_dir=tmp_path)
    builder.data_path.mkdir(parents=True)
    write_splits(builder, "tfrecord", {"test": [records[:100], records[100:]]})
    assert contents(open_source(config, "test")) == contents(expected)


# The index of TFRecord files


def test_files_are_indexed_once(copied, cache, monkeypatch):
    first = contents(open_imagenet(copied, "tfrecord"))
    assert len({len(example["image"]) for example in first[:7]}) > 1
    assert len(list(cache.iterdir())) == 3  # the empty file takes no part
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord, "scan", None)
        assert contents(open_imagenet(copied, "tfrecord", "train[2:]")) == first[2:]
    path = shard_path(copied, "tfrecord", 0)
    records = list(first_records(path))[::-1]
    before = os.stat(path)
    write_shard(path, records, "tfrecord")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert os.stat(path).st_size == before.st_size
    assert contents(open_imagenet(copied, "tfrecord")) == first[6::-1] + first[7:]


def first_records(path):
    """Those of the first shard."""
    return tfrecord.TFRecords([tfds.core.utils.shard_utils.FileInstruction(str(path), 0, 7, 7)])


@pytest.mark.parametrize("rubbish", [b"", b"rubbish", b"\x93NUMPY\x01\x00"])
def test_a_damaged_index_is_made_again(imagenet, cache, rubbish):
    expected = contents(open_imagenet(imagenet[0], "tfrecord"))
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    for path in kept:
        path.write_bytes(rubbish)
    assert contents(open_imagenet(imagenet[0], "tfrecord")) == expected
    assert {path: path.read_bytes() for path in cache.iterdir()} == kept


def test_an_index_of_another_file_is_made_again(imagenet, cache):
    expected = contents(open_imagenet(imagenet[0], "tfrecord"))
    for path in cache.iterdir():
        np.save(path, np.asarray([0, 5], np.uint64))
    assert contents(open_imagenet(imagenet[0], "tfrecord")) == expected


def test_no_place_for_the_index(imagenet, cache, caplog):
    cache.parents[1].write_text("a file where the cache folder should be")
    assert contents(open_imagenet(imagenet[0], "tfrecord")) == imagenet[1]["train"]
    assert "are not kept" in caplog.text


def test_a_full_disk_leaves_no_half_index(imagenet, cache, caplog, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert contents(open_imagenet(imagenet[0], "tfrecord")) == imagenet[1]["train"]
    assert "No space left" in caplog.text and list(cache.iterdir()) == []


def test_several_at_once_index_the_same_files(imagenet, cache):
    paths = [str(shard_path(imagenet[0], "tfrecord", shard)) for shard in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        found = list(executor.map(tfrecord.index_files, [paths] * 8))
    for offsets in found:
        for path in paths:
            np.testing.assert_array_equal(offsets[path], tfrecord.scan(path))
    assert len(list(cache.iterdir())) == 4


# Damage


@pytest.mark.parametrize("cut", [0, 5, 11, 12, 300, -1])
def test_a_cut_off_tfrecord_file_is_named_with_the_offset(copied, cut):
    path = shard_path(copied, "tfrecord", 2)
    offsets = tfrecord.scan(path)
    start = int(offsets[3])
    size = int(offsets[4]) - 1 if cut == -1 else start + cut
    with open(path, "r+b") as file:
        file.truncate(size)
    found = f"record 3 at byte {start} is cut off.* {size}" if cut else "has 3 records, expected 5 as in dataset_info"
    with pytest.raises(ValueError, match=rf"data\.data_dir.*{path}: {found}"):
        open_imagenet(copied, "tfrecord")


@pytest.mark.parametrize("cut", [0, 1, 70_000, -10])
def test_a_cut_off_array_record_file_is_named(copied, cut):
    path = shard_path(copied, "array_record", 2)
    os.truncate(path, cut % path.stat().st_size)
    with pytest.raises(ValueError, match=rf"data\.data_dir.*{path}: is cut off, damaged, or no ArrayRecord file \(\w"):
        open_imagenet(copied, "array_record")


def test_an_array_record_file_with_other_records_is_named(copied):
    path = shard_path(copied, "array_record", 2)
    shutil.copy(shard_path(copied, "array_record", 0), path)
    with pytest.raises(ValueError, match=rf"{path}: has 7 records, expected 5 as in dataset_info.json"):
        open_imagenet(copied, "array_record")


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_damaged_length_is_named_with_the_offset(copied):
    path = shard_path(copied, "tfrecord", 2)
    start = int(tfrecord.scan(path)[3])
    flip(path, start + 1)
    with pytest.raises(ValueError, match=rf"{path}: record 3 at byte {start} has a damaged length"):
        open_imagenet(copied, "tfrecord")


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_data_is_named_or_skipped(imagenet, copied, file_format):
    path = shard_path(copied, file_format, 2)
    position = path.read_bytes().index(imagenet[1]["train"][9]["image"][-80:-30])
    flip(path, position)  # one bit within a JPEG: a decoder would not notice
    source = open_imagenet(copied, file_format)
    place = rf"'imagenet2012', split 'train', index 9 \({path}, record 2.*\): .*mismatch"
    with pytest.raises(ValueError, match=place):
        take(make_train(make_config(), source), 3)
    batches = take(make_train(make_config(**{"data.on_corrupt": "skip"}), source), 5)  # two epochs
    assert np.concatenate([batch["skipped"] for batch in batches]).sum() == 2


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_file_is_named(copied, file_format):
    path = shard_path(copied, file_format, 2)
    path.unlink()
    with pytest.raises(ValueError, match=rf"data\.data_dir.*{path}"):
        open_imagenet(copied, file_format)


def test_a_file_that_changes_under_way_is_noticed(copied):
    source = open_imagenet(copied, "tfrecord")
    path = shard_path(copied, "tfrecord", 0)
    content = path.read_bytes()
    for changed in content[:5], content[:200], content[40:] + bytes(40):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="was changed after it had been opened"):
            source[0]


def test_splits_without_labels_are_refused(copied):
    builder = tfds.builder("imagenet2012", data_dir=copied / "tfrecord")
    example = {"image": noise(1)[0], "label": -1, "file_name": "x"}
    record = builder.info.features.serialize_example(builder.info.features.encode_example(example))
    write_shard(shard_path(copied, "tfrecord", 0), [record] * 7, "tfrecord")
    with pytest.raises(
        ValueError, match=r"00000-of-00004, record 0, byte 0\): the label is -1, expected one of the 1000"
    ):
        take(make_train(make_config(seed=0), open_imagenet(copied, "tfrecord", "train[:1]")), 1)


# Limits


def test_more_array_record_files_than_may_be_open(tmp_path):
    """ImageNet has 1024 training files; 1024 is also what most systems let a process open."""
    builder = tfds.builder("imagenet2012", data_dir=tmp_path)
    builder.data_path.mkdir(parents=True)
    example = {"image": noise(1)[0], "label": 1, "file_name": "x"}
    record = builder.info.features.serialize_example(builder.info.features.encode_example(example))
    write_splits(builder, "array_record", {"train": [[record]] * 40})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        source = open_source(make_config(tmp_path, **{"data.name": "imagenet2012"}).data, "train")
        assert [one["label"] for one in contents(source)] == [1] * 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_array_record_files_than_can_be_open(imagenet, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2, 3))
    monkeypatch.setattr(resource, "setrlimit", None)
    with pytest.raises(ValueError, match=r"data\.data_dir.*has 3 files, expected fewer than the open file limit 3"):
        open_imagenet(imagenet[0], "array_record")
