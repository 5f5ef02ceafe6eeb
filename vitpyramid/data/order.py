"""Which example stands in which row of which batch: a pure function of the seed, computed and never stored."""

import threading

import grain
import numpy as np

_DRAWING = threading.Lock()  # so that threads do not draw the same epoch at once
_EPOCHS = 4  # that are kept


def train_order(size: int, seed: int, batch_size: int, repeats: int, groups: int = 1) -> grain.MapDataset:
    """The endless order of training: element t is the index of the example in row t mod B of batch t div B.

    It is a random permutation of the split, then another one, and so on. With `repeats` > 1 it is repeated augmentation
    (Hoffer et al. 2020), as in the official code of DeiT, PVT and ResT (`samplers.py`): see `_Repeated`.

    Args:
      size: examples of the split, N.
      seed: `config.seed`.
      batch_size: global, B.
      repeats: copies of an example; 0 or 1 for none.
      groups: runs of rows of a batch that stand for the processes of the official code, to which copies are dealt out;
        without copies they change nothing.

    Raises:
      ValueError: `repeats` > 1 and B > N: an epoch of floor(N / B) steps would have none; or B is no multiple of
        `groups`.
    """
    order = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    if repeats <= 1:
        return order
    if batch_size > size:
        raise ValueError(
            f"data.repeats: {repeats} needs a batch_size of at most the {size} examples, not {batch_size}."
        )
    if batch_size % groups:
        raise ValueError(f"mix.groups: {groups} is no divisor of batch_size = {batch_size}.")
    return _Repeated(order, size, repeats, batch_size, groups)


def eval_order(size: int, batch_size: int, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The order of evaluation: the index of the example in each row of all batches, and whether it is one.

    Examples stand in the split's order, each once, one group after the other. A group's last batch is filled up with
    rows that are no examples; their index is that of the group's last example.

    Args:
      size: examples of the split.
      batch_size: global.
      groups: see `Grouped`; None: one group.

    Returns:
      int64 [n] and bool [n].
    """
    members = [np.arange(size)] if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]
    fillers = [-len(group) % batch_size for group in members]
    indices = [np.pad(group, (0, count), mode="edge") for group, count in zip(members, fillers, strict=True)]
    real = [np.arange(len(padded)) < len(group) for padded, group in zip(indices, members, strict=True)]
    return np.concatenate(indices), np.concatenate(real)


class Grouped(grain.MapDataset):
    """An endless order in which every batch holds examples of one group, such as images of one canvas.

    Examples come as in `parent` and wait until there are `batch_size` of their group, which then are the next batch:
    detectron2's `AspectRatioGroupedDataset`, over any number of epochs and hosts. So each example comes once in each
    permutation, as without groups, and e permutations of N examples have e * N / B batches, less than one for each
    group fewer. Which batch is the k-th follows from the permutations of its epoch alone: those before it left
    e * n mod B of a group's n examples waiting.
    """

    def __init__(self, parent: grain.MapDataset, groups: np.ndarray, batch_size: int):
        """Takes an order without copies.

        Args:
          parent: permutations of the N examples, one after the other.
          groups: int [N], the group of each example, counted from 0.
          batch_size: global, B.
        """
        super().__init__(parent)
        self._groups = groups
        self._sizes = np.bincount(groups).tolist()
        self._batch_size = batch_size
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._batch_size)
        epoch = batch * self._batch_size // len(self._groups)  # as many batches are full by then at most
        while self._full(epoch + 1) <= batch:
            epoch += 1
        group, number = self._draw(epoch)[1][batch - self._full(epoch)].tolist()
        epoch, place = divmod(number * self._batch_size + row, self._sizes[group])
        return int(self._draw(epoch)[0][group][place])

    def _full(self, epochs: int) -> int:
        """Batches that are full after so many permutations."""
        return sum(epochs * size // self._batch_size for size in self._sizes)

    def _draw(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The examples of each group in a permutation, and group and number in it of the batches that it fills."""
        with _DRAWING:
            if epoch not in self._epochs:
                while len(self._epochs) >= _EPOCHS:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[epoch] = self._permutation(epoch)
            return self._epochs[epoch]

    def _permutation(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        first = epoch * len(self._groups)
        examples = np.array([self._parent[first + i] for i in range(len(self._groups))])
        places = [np.flatnonzero(self._groups[examples] == group) for group in range(len(self._sizes))]
        filled = []  # place of the example that fills a batch, group, number
        for group, size in enumerate(self._sizes):
            numbers = range(epoch * size // self._batch_size, (epoch + 1) * size // self._batch_size)
            last = [(number + 1) * self._batch_size - 1 - epoch * size for number in numbers]
            filled += zip(places[group][last].tolist(), [group] * len(last), numbers, strict=True)
        batches = np.array(sorted(filled), np.int64).reshape(-1, 3)[:, 1:]
        return [examples[place] for place in places], batches


class HostRows(grain.MapDataset):
    """One host's rows of every global batch from `start_step` on: [h * rows, (h + 1) * rows) of each.

    Contiguous, so that the hosts' batches side by side are the global batch, row by row; every process_count-th
    example, as a Grain slice would give, makes the same set in another order.
    """

    def __init__(
        self, parent: grain.MapDataset, rows: int, process_index: int, process_count: int, start_step: int = 0
    ):
        super().__init__(parent)
        self._rows = rows
        self._first = start_step * process_count + process_index  # counted in runs of `rows` examples
        self._stride = process_count

    def __len__(self) -> int:
        return len(self._parent) // self._stride

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._parent[(self._first + step * self._stride) * self._rows + row]


def host_rows(key: str, batch_size: int, process_index: int, process_count: int) -> int:
    """The number of rows of a global batch on each host.

    Raises:
      ValueError: `process_index` is out of range, or `batch_size`, the value of the config key `key`, is no multiple.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, process_count = {process_count}).")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"{key}: {batch_size} is no positive multiple of the number of hosts, {process_count}.")
    return batch_size // process_count


class _Repeated(grain.MapDataset):
    """The first `draws` elements of each permutation with every one `repeats` times in a row.

    Epoch e has `draws` = floor(N / B) * B rows. Draw q of it is element q div `repeats` of the e-th permutation, whose
    rest is not seen in this epoch. So an epoch has as many steps as without repeats and sees ceil(draws / repeats)
    examples, about a third of the split with three copies. Copies are neighbouring draws, all of them in one batch but
    for the example at its end: where `repeats` does not divide B, some of its copies come first in the next batch.

    A batch's draws are dealt out to its `groups` runs of rows, draw q to run q mod `groups`, so that copies are mixed
    with other images and never with each other. With one group row q is draw q.

    This is what the official sampler gives, row for row: there rank r of R takes the elements r, r + R, ... which are
    the rows of run r here. Its epoch ends at floor(N / 256) * 256, ours with the last whole batch. The batch is the
    same one for any number of hosts.
    """

    def __init__(self, parent: grain.MapDataset, size: int, repeats: int, batch_size: int, groups: int):
        super().__init__(parent)
        self._size = size
        self._repeats = repeats
        self._batch_size = batch_size
        self._groups = groups

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._batch_size)
        epoch, step = divmod(step, self._size // self._batch_size)
        group, place = divmod(row, self._batch_size // self._groups)
        draw = step * self._batch_size + place * self._groups + group
        return self._parent[epoch * self._size + draw // self._repeats]
