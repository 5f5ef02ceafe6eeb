"""Random access to TFDS data sets without TensorFlow."""

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from vitpyramid.data.digits import Digits

log = logging.getLogger(__name__)
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


@dataclasses.dataclass(frozen=True)
class Source:
    """A random-access split of encoded images; picklable, so data workers can open it again.

    `source[i]`, 0 <= i < len(source), is `{"image": bytes (PNG, JPEG ...), "label": int}`.
    """

    name: str
    split: str
    num_classes: int
    records: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {"image": record["image"], "label": int(record["label"])}


def open_source(data_config, split: str) -> Source:
    """Opens one split of a prepared TFDS data set; `digits` is prepared on first use.

    Args:
      data_config: `config.data`; reads `name` (a TFDS builder name, e.g. "imagenet2012") and `data_dir` ("" stands for
        the TFDS default).
      split: a TFDS split, sub-splits included: "train", "train[:99%]", "validation".

    Returns:
      The split, unshuffled.

    Raises:
      ValueError: no such data set, not prepared, not prepared as ArrayRecord, no such split, an empty split, or no
        image and class label in its features.
    """
    name, data_dir = data_config.name, os.path.expanduser(data_config.data_dir)  # TFDS leaves a ~ as it is
    builder = _prepared_digits(data_dir) if name == "digits" else _prepared_builder(name, data_dir)
    features = builder.info.features
    expected = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(key in features and isinstance(features[key], kind) for key, kind in expected.items()):
        raise ValueError(
            f"data.name: {name!r} is no image classification set: expected the features 'image' (Image) and 'label' "
            f"(ClassLabel), it has {sorted(features)}."
        )
    records = _open_records(builder, split)
    if len(records) == 0:
        raise ValueError(f"data.train_split / data.eval_split: the split {split!r} of {name!r} is empty.")
    return Source(name=name, split=split, num_classes=features["label"].num_classes, records=records)


def _open_records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
    if _ARRAY_RECORD not in builder.info.available_file_formats():
        path = str(builder.data_path)
        raise ValueError(
            f"data.name / data.data_dir: {builder.info.full_name!r} in {path!r} is prepared as "
            f"{builder.info.file_format.value}; random access needs array_record. Convert it in place (the old files "
            "stay), in an environment with TensorFlow installed, with:\n"
            f"  tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )
    try:
        return builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=_ARRAY_RECORD.value
        )
    except (ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data.train_split / data.eval_split: cannot open the split {split!r} of {builder.info.full_name!r}; "
            f"available: {', '.join(sorted(builder.info.splits))}, or a part of one such as 'train[:99%]'. ({reason})"
        ) from error


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"data.name: TFDS knows no data set {name!r} (data.data_dir: {data_dir!r}). Expected 'digits', a builder "
            "name such as 'imagenet2012', or the name of a data set that lies prepared in data.data_dir."
        ) from error
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
    builder = Digits(data_dir=data_dir or None)
    if builder.data_path.exists():
        return builder
    log.info("preparing digits in %s (1797 images, once)", builder.data_path)
    try:
        # TFDS says, over several screens, that it downloads; there is nothing to download.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(file_format=_ARRAY_RECORD.value)
    except OSError:
        if not builder.data_path.exists():
            raise
        log.info("another process prepared digits meanwhile")
    # Opened anew: the builder that lost the race describes files that are gone.
    return Digits(data_dir=data_dir or None)
