"""Split specifications in TFDS's syntax ("train[:99%]", "train+validation") for sources that TFDS does not know."""

from collections.abc import Iterable, Mapping

import tensorflow_datasets as tfds


def unknown_split(name: str, split: str, available: Iterable[str], reason: str) -> ValueError:
    """The error for a split of the data set `name` that cannot be opened."""
    listed = ", ".join(map(repr, sorted(available))) or "none"
    return ValueError(
        f"data.train_split / data.eval_split: cannot open the split {split!r} of {name!r}; available: {listed}, or a "
        f"part of one such as 'train[:99%]'. ({reason})"
    )


def split_names(split: str) -> list[str]:
    """The splits that a specification takes examples from: "train[:99%]+test" -> ["train", "test"]."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def split_ranges(name: str, split: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The examples that a specification stands for: of each of its terms the split and the positions in it.

    Args:
      name: the data set, for messages.
      split: a specification; percentages are rounded as TFDS rounds them.
      sizes: number of examples of each split.

    Raises:
      ValueError: not in TFDS's syntax, an unknown split, or bounds beyond its end.
    """
    infos = [tfds.core.SplitInfo(name=key, shard_lengths=[size], num_bytes=0) for key, size in sizes.items()]
    try:
        terms = tfds.core.ReadInstruction.from_spec(split).to_absolute(tfds.core.splits.SplitDict(infos))
    except (ValueError, NotImplementedError) as error:
        raise unknown_split(name, split, sizes, str(error).splitlines()[0]) from error
    return [
        (term.splitname, range(term.from_ or 0, sizes[term.splitname] if term.to is None else term.to))
        for term in terms
    ]
