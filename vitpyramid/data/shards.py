"""Where the examples of a split lie that is spread over files."""

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence


class Shards:
    """The files of a split, in order, and which of their records belong to it; TFDS's file instructions.

    Attributes:
      paths: of the files; one may come several times ("train[:10]+train[20:30]").
    """

    def __init__(self, instructions: Sequence):
        self.paths = [os.fspath(instruction.filename) for instruction in instructions]
        self._skips = [instruction.skip for instruction in instructions]
        self._ends = list(itertools.accumulate(instruction.take for instruction in instructions))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The position in `paths` of the file that holds an example, and the example's position in that file."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)}).")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0) + self._skips[shard]


def check_counts(instructions: Sequence, counts: Mapping[str, int]) -> None:
    """Compares the records that each file has, by path, with TFDS's instructions.

    Raises:
      ValueError: a file has more or fewer.
    """
    for instruction in instructions:
        path = os.fspath(instruction.filename)
        if counts[path] != instruction.examples_in_shard:
            raise ValueError(
                f"{path}: has {counts[path]} records, expected {instruction.examples_in_shard} as in dataset_info.json "
                "beside it."
            )
