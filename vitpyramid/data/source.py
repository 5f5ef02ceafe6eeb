"""Random access to the encoded images of a split, wherever they lie."""

import dataclasses
from typing import Any, Protocol

from vitpyramid.data.folder import open_folder
from vitpyramid.data.prepared import open_prepared
from vitpyramid.data.synthetic import open_synthetic
from vitpyramid.files import as_path, reach


class Records(Protocol):
    """What a kind of source provides; picklable, so that data workers can open it again."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example with at least `image` (bytes) and `label` (an integer); any exception if it cannot be read."""

    def where(self, index: int) -> str:
        """The file and the place in it, for messages."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A random-access split of encoded images; picklable, so data workers can open it again.

    `source[i]`, 0 <= i < len(source), is `{"image": bytes (PNG, JPEG ...), "label": int}`; whatever the reader raises
    if it cannot be read, ValueError if its label is no class. Labels are places in `class_names`.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    records: Records

    @property
    def num_classes(self) -> int:
        """How many there are names of."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        label = int(record["label"])
        if not 0 <= label < self.num_classes:  # TFDS says -1 in splits without labels
            raise ValueError(f"the label is {label}, expected one of the {self.num_classes} classes")
        return {"image": record["image"], "label": label}

    def where(self, index: int) -> str:
        """The file and the place in it where an example lies, for messages."""
        return self.records.where(index)


def open_source(data_config, split: str) -> Source:
    """Opens one split of a data set, unshuffled.

    Args:
      data_config: `config.data`; reads `name`, which is one of
        "folder": images in `data_dir`/SPLIT/CLASS/, see `vitpyramid.data.folder`;
        "synthetic": made up, of ImageNet's size, see `vitpyramid.data.synthetic`;
        "digits": scikit-learn's, prepared as a TFDS data set on first use;
        any other: the name of a TFDS builder, such as "imagenet2012", prepared as ArrayRecord or TFRecord.
        Reads `data_dir` ("" stands for the TFDS default), and for "folder" `train_split`, `eval_split`, `on_corrupt`.
      split: a split, sub-splits included: "train", "train[:99%]", "validation".

    Raises:
      ValueError: no such data set, not prepared, no such split, an empty split, damaged or missing files, or no image
        and class label in its features.
    """
    name = data_config.name
    try:
        reach(as_path(data_config.data_dir))
    except (ValueError, OSError) as error:
        raise ValueError(f"data.data_dir: {error}") from error
    if name == "folder":
        records, names = open_folder(data_config, split)
    elif name == "synthetic":
        records, names = open_synthetic(split)
    else:
        records, names = open_prepared(name, data_config.data_dir, split)
    if len(records) == 0:
        raise ValueError(f"data.train_split / data.eval_split: the split {split!r} of {name!r} is empty.")
    return Source(name=name, split=split, class_names=names, records=records)
