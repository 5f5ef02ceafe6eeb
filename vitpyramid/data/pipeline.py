"""Batches for one host, through Grain: a training stream that is a pure function of (seed, step), and evaluation."""

import atexit
import functools
import itertools
import logging
import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from vitpyramid.data import augment
from vitpyramid.data.order import HostRows, eval_order, host_rows, train_order
from vitpyramid.data.source import Source

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
# Of an example of the source and its index, in training also with a generator: its row of a batch; any exception if the
# example is damaged. Functions of modules, or partial ones of such, as workers get them.
TrainRow = Callable[[Any, int, np.random.Generator], Batch]
EvalRow = Callable[[Any, int], Batch]
_PIECE = 32  # examples at most that one thread makes at a time
_SKIPPED: set[str] = set()  # places of examples that a warning was logged for; one each, not one an epoch
_MOST_SKIPPED = 100  # examples in a row; more are no damaged files but a disk that is gone


class UnreadableError(OSError, ValueError):
    """Examples that cannot be read; the message says which, where they lie, and why."""


def make_train(
    config, source: Source, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> "BatchIterator":
    """Returns the endless training stream of one host, from batch `start_step` on.

    The stream is a permutation of the split, then another one, and so on, cut into batches of B = `batch_size`. So
    every batch is full and no example is dropped; a batch may hold the end of one permutation and the beginning of the
    next. Schedules call floor(N / B) steps an epoch of N examples; the next epoch goes on with the example after the
    last one drawn, also within a permutation. `data.repeats` changes that, see `vitpyramid.data.order`.

    Host h holds the rows [h * b, (h + 1) * b) of each global batch: side by side the hosts' batches are the batch that
    one host would have. Batch k depends on `config.seed`, `data.repeats`, `mix.groups` and k alone, not on the number
    of hosts, threads or workers, nor on where the stream was entered; `start_step` costs the same wherever it lies.

    With `data.on_corrupt` "skip", an example that cannot be read is replaced by the next one of the split that can, as
    a function of its index alone, so all of the above holds as long as the same files can be read.

    Memory on the host: at most 4 * b + 64 * threads examples of height * width * 3 bytes (the batch that was returned,
    the next one in pieces and joined, one read ahead, and up to 32 examples, twice, in each thread's hands), and one
    decoded image a thread. With workers, each has so many threads, and some 100 MiB of its own.

    Args:
      config: reads `seed`, `batch_size` (global), `mix.groups` and, in `data`, what `augment.from_config` reads,
        `repeats`, `on_corrupt` ("error" or "skip"), `threads` and `workers`. With `workers` > 0 the calling program
        needs `if __name__ == "__main__":`, since the workers are spawned.
      source: see `open_source`.
      start_step: first batch to return; a resumed run passes its step.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      An iterator, with `close()`, of {"image": uint8 [b, height, width, 3], "label": int32 [b]}, where b is
      batch_size // process_count. With `on_corrupt` "skip" also "skipped": bool [b], True where another example stands.

    Raises:
      ValueError: `batch_size` is no multiple of `process_count`, or see `train_order`.
      UnreadableError: from the iterator; a record that cannot be read, with its split, index and file; with
        `on_corrupt` "skip", a hundred in a row that cannot.
    """
    row = functools.partial(_train_row, settings=augment.from_config(config.data))
    order = train_order(len(source), config.seed, config.batch_size, config.data.repeats, config.mix.groups)
    return train_stream(config, source, order, row, start_step, process_index, process_count)


def make_eval(config, source: Source, process_index: int = 0, process_count: int = 1) -> "EvalBatches":
    """Returns one host's share of a split, in order, every example exactly once over all hosts.

    Rows are dealt to hosts as in `make_train`. The end is padded with black images, label 0 and mask False, so that
    all hosts see the same number of batches, all of the same shape.

    Args:
      config: reads `eval.batch_size` (global) and, in `data`, as `make_train`.
      source: see `open_source`.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      A sized iterable, to be walked as often as wanted, of {"image": uint8 [b, height, width, 3], "label": int32 [b],
      "mask": bool [b]}, where b is eval.batch_size // process_count. With `on_corrupt` "skip" also "skipped": bool [b],
      True for an example that cannot be read: black, label 0 and mask False, like padding.

    Raises:
      ValueError: as `make_train`.
      UnreadableError: from the iterator, as `make_train`; with `on_corrupt` "skip", at the end, if not one of this
        host's examples could be read.
    """
    settings = augment.from_config(config.data)
    row = functools.partial(_eval_row, settings=settings)
    blank = functools.partial(_blank_row, size=settings.image_size)
    return eval_batches(config, source, row, blank, process_index, process_count)


def train_stream(
    config,
    source,
    order: grain.MapDataset,
    row: TrainRow,
    start_step: int,
    process_index: int,
    process_count: int,
    groups: np.ndarray | None = None,
) -> "BatchIterator":
    """Returns one host's share of the training stream that `order` gives; what `make_train` promises holds of it.

    Args:
      config: reads `batch_size` and, in `data`, `on_corrupt`, `threads` and `workers`.
      source: has `name`, `split`, a length, examples by index, and `where(index)` for messages.
      order: index of the example of each position in the endless stream.
      row: what becomes of an example. Its generator is keyed by the position, so that an example is another one in
        each epoch and each copy.
      groups: int [len(source)], numbers of groups whose rows alone may stand in one batch; None: one group.
    """
    rows = host_rows("batch_size", config.batch_size, process_index, process_count)
    skip = config.data.on_corrupt == "skip"
    load = functools.partial(_train_example, source=source, skip=skip, row=row, groups=groups)
    # Before the choice of the host's rows, which renumbers positions.
    mine = HostRows(order.random_map(load), rows, process_index, process_count, start_step)
    return BatchIterator(mine, rows, config.data.threads, config.data.workers, endless=True)


def eval_batches(
    config,
    source,
    row: EvalRow,
    blank: Callable[[int], Batch],
    process_index: int,
    process_count: int,
    groups: np.ndarray | None = None,
) -> "EvalBatches":
    """Returns one host's share of a split, every example exactly once over all hosts; `mask` is added to the rows.

    Args:
      config: reads `eval.batch_size` and, in `data`, `on_corrupt`, `threads` and `workers`.
      source, groups: as `train_stream`.
      row: what becomes of an example.
      blank: of an index, the row of nothing that fills up a batch of that example's group, or replaces that example.
    """
    rows = host_rows("eval.batch_size", config.eval.batch_size, process_index, process_count)
    indices, real = eval_order(len(source), config.eval.batch_size, groups)
    skip = config.data.on_corrupt == "skip"
    load = functools.partial(_eval_example, indices=indices, real=real, source=source, skip=skip, row=row, blank=blank)
    mine = HostRows(grain.MapDataset.range(len(indices)).map(load), rows, process_index, process_count)
    return EvalBatches(mine, source, rows, config.data.threads, config.data.workers)


class EvalBatches:
    """A sized, re-iterable run of batches; every `iter` starts from the first one."""

    def __init__(self, examples: grain.MapDataset, source: Source, rows: int, threads: int, workers: int):
        self._examples = examples
        self._source = source
        self._rows = rows
        self._threads = threads
        self._workers = workers

    def __len__(self) -> int:
        return len(self._examples) // self._rows

    def __iter__(self) -> Iterator[Batch]:
        batches = BatchIterator(self._examples, self._rows, self._threads, self._workers, endless=False)
        read = skipped = 0
        try:
            for batch in batches:
                read += batch["mask"].sum()
                skipped += batch["skipped"].sum() if "skipped" in batch else 0
                yield batch
        finally:
            batches.close()
        if skipped and not read:  # a host may have nothing but padding
            raise UnreadableError(
                f"data.on_corrupt: {self._source.name!r}, split {self._source.split!r}: none of the {skipped} examples "
                "of this host can be read, expected at least one."
            )


class BatchIterator(Iterator[Batch]):
    """Batches of `rows` examples, read ahead by threads, or by worker processes with so many threads each.

    Lets go of threads and processes when exhausted, dropped or closed, and at the latest when the interpreter exits.
    """

    def __init__(self, examples: grain.MapDataset, rows: int, threads: int, workers: int, endless: bool):
        # Threads and workers make pieces of a batch, not batches: 16 threads with 16 batches of 1024 in the making
        # would fill gigabytes, and the first batch would be long in coming. Cut before to_iter_dataset, the pieces
        # are dealt out and taken back in order, so the number of threads and workers changes no batch.
        piece = max(size for size in range(1, _PIECE + 1) if rows % size == 0)
        self._pieces = rows // piece
        # An endless stream has no remainder, but without drop_remainder its length in pieces of one overflows.
        dataset = examples.batch(piece, drop_remainder=True)
        ahead = threads + -(-self._pieces // max(workers, 1))  # in all, one batch beyond what is in the making
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if workers > 0:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads absl flags to start a worker; a notebook never parses them
            # Shared memory costs half of what a pipe does, but not when the stream has an end: Grain's StopIteration
            # keeps each worker's last piece in a cycle, and shared memory would be reported leaked at exit.
            options = grain.experimental.DatasetOptions(min_shm_size=0 if endless else sys.maxsize)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, _end_with_parent)
        self._iterator = iter(dataset)
        _OPEN.add(self)

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            pieces = list(itertools.islice(self._iterator, self._pieces))
        except BaseException:
            self.close()  # half a batch is lost: going on would return shifted ones
            raise
        if not pieces:
            self.close()
            raise StopIteration
        # asarray: shared memory must not outlive this call, nor must its array type.
        return {key: np.concatenate([np.asarray(piece[key]) for piece in pieces]) for key in pieces[0]}

    def close(self) -> None:
        """Stops reading; there are no more batches afterwards, nor after an error. May be called twice."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()


_OPEN: weakref.WeakSet[BatchIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Left to the interpreter's teardown, Grain's destructors find their modules gone: noise and leaked shared memory.
    for iterator in list(_OPEN):
        iterator.close()


def _end_with_parent(worker: int, workers: int) -> None:
    """Runs in each worker: lets it end when the process that started it is gone, be it by SIGKILL."""
    del worker, workers
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    # Waits on a pipe. Linux's PR_SET_PDEATHSIG would fire when the thread ends that started the worker.
    multiprocessing.parent_process().join()
    # By then the worker waits for room in its queue, so that it is not killed between making shared memory and
    # registering it. With the last worker ends the resource tracker of multiprocessing, which frees what is registered.
    time.sleep(1)
    os._exit(1)


def _train_row(example: dict, index: int, rng: np.random.Generator, *, settings: augment.Augmentation) -> Batch:
    return {"image": augment.train_image(example["image"], rng, settings), "label": np.int32(example["label"])}


def _eval_row(example: dict, index: int, *, settings: augment.Augmentation) -> Batch:
    return {"image": augment.eval_image(example["image"], settings), "label": np.int32(example["label"])}


def _blank_row(index: int, *, size: tuple[int, int]) -> Batch:
    return {"image": np.zeros((*size, 3), np.uint8), "label": np.int32(0)}


def _train_example(
    index: int, rng: np.random.Generator, *, source, skip: bool, row: TrainRow, groups: np.ndarray | None
) -> Batch:
    """An example's row, or with `skip` that of the next one that can be read, and `skipped`, whether it is another."""
    tries = 0
    for candidate in _candidates(index, len(source), groups):
        made = _read(source, candidate, lambda example, index: row(example, index, rng), skip)
        if made is not None:
            return made | ({"skipped": np.bool_(tries > 0)} if skip else {})
        tries += 1
    raise UnreadableError(
        f"data.on_corrupt: {source.name!r}, split {source.split!r}: none of the {tries} examples from index {index} on "
        "can be read."
    )


def _candidates(index: int, size: int, groups: np.ndarray | None) -> Iterator[int]:
    """The example, then those of its group that may stand for it: the next ones, from the end on the first ones."""
    yield index
    others = np.roll(np.arange(size), -index)[1:]
    if groups is not None:
        others = others[groups[others] == groups[index]]
    yield from others[: _MOST_SKIPPED - 1].tolist()


def _eval_example(
    position: int,
    *,
    indices: np.ndarray,
    real: np.ndarray,
    source,
    skip: bool,
    row: EvalRow,
    blank: Callable[[int], Batch],
) -> Batch:
    index, exists = int(indices[position]), bool(real[position])
    made = _read(source, index, row, skip) if exists else None
    skipped = {"skipped": np.bool_(exists and made is None)} if skip else {}
    return (blank(index) if made is None else made) | {"mask": np.bool_(made is not None)} | skipped


def _read(source, index: int, row: EvalRow, skip: bool) -> Batch | None:
    """An example's row; with `skip`, None if it cannot be read."""
    try:
        return row(source[index], index)
    # Broad: whatever a damaged file makes the reader raise, the message must say which record it was.
    except Exception as error:
        place = f"{source.name!r}, split {source.split!r}, index {index} ({source.where(index)})"
        if not skip:
            raise UnreadableError(f"{place}: {error}") from error
        if place not in _SKIPPED:
            _SKIPPED.add(place)
            log.warning("skipped %s: %s", place, error)
        return None
