"""TFDS data sets that lie prepared on disk or in a bucket, as ArrayRecord or TFRecord, read without TensorFlow."""

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from vitpyramid.data.digits import Digits
from vitpyramid.data.shards import Shards, check_counts
from vitpyramid.data.splits import unknown_split
from vitpyramid.data.tfrecord import TFRecords
from vitpyramid.files import in_bucket
from vitpyramid.progress import with_progress

log = logging.getLogger(__name__)
_THREADS = 16  # that open files; more than the cores, for file systems that answer slowly
ARRAY_RECORD, TFRECORD = tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD


class ArrayRecords(Sequence[bytes]):
    """The records of a split of ArrayRecord files; picklable. Checksums are verified at every reading."""

    def __init__(self, instructions: Sequence):
        """Counts the records of each file; they are opened again when needed.

        Args:
          instructions: TFDS's, of the split: `builder.info.splits[split].file_instructions`.

        Raises:
          ValueError: a file is missing, cut off, or has not as many records as it should, or there are more files than
            the process may hold open.
        """
        # Imported here: there is no array_record for Windows.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._shards = Shards(instructions)
        if missing := [path for path in self._shards.paths if not os.path.exists(path)]:
            raise ValueError(f"{missing[0]}: there is no such file ({len(missing)} of the split are missing).")
        check_counts(instructions, _count_records(list(dict.fromkeys(self._shards.paths))))
        _allow_open_files(len(self._shards.paths))
        self._files = ArrayRecordDataSource(instructions) if instructions else []

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> bytes:
        return self._files[index]

    def where(self, index: int) -> str:
        """The record's file and place in it, for messages."""
        shard, position = self._shards.locate(index)
        return f"{self._shards.paths[shard]}, record {position}"


@dataclasses.dataclass(frozen=True)
class PreparedRecords:
    """Encoded images and labels out of serialised TFDS examples."""

    features: tfds.features.FeaturesDict
    examples: ArrayRecords | TFRecords

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        decoders = {"image": tfds.decode.SkipDecoding()}
        return self.features.deserialize_example_np(self.examples[index], decoders=decoders)

    def where(self, index: int) -> str:
        """The record's file and place in it, for messages."""
        return self.examples.where(index)


def open_prepared(name: str, data_dir: str, split: str) -> tuple[PreparedRecords, tuple[str, ...]]:
    """Opens one split of a TFDS data set; `digits` is prepared on first use.

    Args:
      name: a TFDS builder name.
      data_dir: where TFDS data sets are, TFRecord ones also at gs://...; "" stands for the TFDS default.
      split: a TFDS split, sub-splits included.

    Returns:
      The records, and the names of the classes.

    Raises:
      ValueError: no such data set, not prepared, neither as ArrayRecord nor as TFRecord, damaged or missing files, no
        such split, or no image and class label in its features.
    """
    builder = open_builder(name, data_dir)
    features = builder.info.features
    expected = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(key in features and isinstance(features[key], kind) for key, kind in expected.items()):
        raise ValueError(
            f"data.name: {name!r} is no image classification set: expected the features 'image' (Image) and 'label' "
            f"(ClassLabel), it has {sorted(features)}."
        )
    return PreparedRecords(features, open_examples(builder, split)), tuple(features["label"].names)


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is prepared; `digits` is prepared on first use. See `open_prepared`."""
    data_dir = os.path.expanduser(data_dir)  # TFDS leaves a ~ as it is
    if name == "digits" and in_bucket(data_dir):
        raise ValueError(f"data.data_dir: {data_dir}: expected a folder of this machine for 'digits', 2 MB")
    return _prepared_digits(data_dir) if name == "digits" else _prepared_builder(name, data_dir)


def open_examples(builder: tfds.core.DatasetBuilder, split: str) -> ArrayRecords | TFRecords:
    """The serialised examples of a split. See `open_prepared`."""
    file_format = _file_format(builder)
    instructions = _file_instructions(builder, split, file_format)
    try:
        return (ArrayRecords if file_format == ARRAY_RECORD else TFRecords)(instructions)
    except ValueError as error:
        raise ValueError(f"data.name / data.data_dir: {builder.info.full_name!r}: {error}") from error


def _file_format(builder: tfds.core.DatasetBuilder) -> tfds.core.FileFormat:
    """ArrayRecord where there are both: its files need no index."""
    # `info.available_file_formats()` forgets what `tfds convert_format` added to a set whose builder is in TFDS's code.
    stored = builder.info.as_proto
    available = {stored.file_format, *stored.alternative_file_formats}
    remote = in_bucket(builder.data_path)
    for file_format in (TFRECORD,) if remote else (ARRAY_RECORD, TFRECORD):
        if file_format.value in available:
            return file_format
    if remote and ARRAY_RECORD.value in available:
        raise ValueError(
            f"data.data_dir: {builder.data_path}: ArrayRecord's library reads no buckets, expected tfrecord. Or mount "
            "the bucket with gcsfuse, or copy the folder to a disk, and name that folder"
        )
    raise ValueError(
        f"data.name / data.data_dir: {builder.info.full_name!r} in {str(builder.data_path)!r} is prepared as "
        f"{', '.join(sorted(available))}, expected array_record or tfrecord. Convert it in place (the old files stay), "
        "in an environment with TensorFlow installed, with:\n"
        f"  tfds convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record"
    )


def _file_instructions(builder: tfds.core.DatasetBuilder, split: str, file_format: tfds.core.FileFormat) -> list:
    infos = [
        info.replace(filename_template=info.filename_template.replace(filetype_suffix=file_format.file_suffix))
        for info in builder.info.splits.values()
    ]
    try:
        return tfds.core.splits.SplitDict(infos)[split].file_instructions
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise unknown_split(builder.info.full_name, split, builder.info.splits, reason) from error


def _count_records(paths: Sequence[str]) -> dict[str, int]:
    """The number of records of each ArrayRecord file, as its end states it: 0.1 ms each on a local disk."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        counts = executor.map(_count, paths)
        return dict(zip(paths, with_progress(counts, len(paths), "counting ArrayRecord files"), strict=True))


def _count(path: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, options="readahead_buffer_size:0")
    count = reader.num_records()  # 0 if the end is damaged; what is wrong is told when closing
    try:
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path}: is cut off, damaged, or no ArrayRecord file ({error}).") from error
    return count


def _allow_open_files(count: int) -> None:
    """Raises the process's limit of open files by `count`, as far as the system lets it.

    Each ArrayRecord file stays open once it has been read from. ImageNet's training split has 1024 files, as many as
    most systems allow a process that does not ask for more.
    """
    # Imported here: there is no such module on Windows.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard):
        return
    if count >= hard:
        raise ValueError(f"the split has {count} files, expected fewer than the open file limit {hard} (ulimit -Hn).")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))


@contextlib.contextmanager
def _opening(name: str, data_dir: str) -> Iterator[None]:
    """Whatever TFDS raises while it looks for a data set becomes one ValueError."""
    try:
        yield
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"data.name: TFDS knows no data set {name!r} (data.data_dir: {data_dir!r}). Expected 'digits', 'folder', "
            "'synthetic', a builder name such as 'imagenet2012', or the name of a data set that lies prepared in "
            "data.data_dir."
        ) from error
    # Broad: AssertionError for an unknown version, ParseError or RuntimeError for a damaged dataset_info.json,
    # ImportError for a missing package, ValueError for an unknown config or a name that is none.
    except Exception as error:
        first_line = (str(error) or type(error).__name__).partition("\n")[0]
        reason = first_line.rpartition('}": ')[2].strip()  # without the arguments, which TFDS repeats
        raise ValueError(
            f"data.name / data.data_dir: cannot open {name!r} in {data_dir!r}, expected NAME[/CONFIG][:VERSION] of a "
            "data set, undamaged dataset_info.json and features.json in its folder, and the packages that reading it "
            f"needs. ({reason})"
        ) from error


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    with _opening(name, data_dir):
        builder = tfds.builder(name, data_dir=data_dir or None)
    if not builder.is_prepared():
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise ValueError(
            f"data.name / data.data_dir: {name!r} is not prepared in {str(builder.data_path)!r} (data.data_dir: "
            f"{data_dir!r}). Prepare it once, in an environment with TensorFlow installed, with:\n"
            f"  tfds build {name} --file_format=array_record{where}"
        )
    return builder


def _prepared_digits(data_dir: str) -> Digits:
    """Opens digits, preparing it first if it is not there.

    TFDS writes into a directory of its own beside the final one and renames it when complete. So a killed process
    leaves only a directory that nobody opens, and of two processes at once the later one fails to rename onto the
    first one's result, which is then as good.
    """
    with _opening("digits", data_dir):
        builder = Digits(data_dir=data_dir or None)
    if builder.data_path.exists():
        return builder
    log.info("preparing digits in %s (1797 images, once)", builder.data_path)
    try:
        # TFDS says, over several screens, that it downloads; there is nothing to download.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(file_format=ARRAY_RECORD.value)
    except OSError:
        if not builder.data_path.exists():
            raise
        log.info("another process prepared digits meanwhile")
    # Opened anew: the builder that lost the race describes files that are gone.
    return Digits(data_dir=data_dir or None)
