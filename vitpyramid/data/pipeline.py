"""Batches for one host, through Grain: a training stream that is a pure function of (seed, step), and evaluation."""

import atexit
import functools
import itertools
import sys
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from PIL import Image

from vitpyramid.data import augment
from vitpyramid.data.source import Source

Batch = dict[str, np.ndarray]
_PIECE = 32  # examples at most that one thread makes at a time


def make_train(
    config, source: Source, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> "BatchIterator":
    """Returns the endless training stream of one host, from batch `start_step` on.

    The stream is one permutation of the split after another, a fresh one each epoch. Batches straddle epochs, so no
    example is ever dropped and every global batch is full. Host h holds the rows [h * b, (h + 1) * b) of each global
    batch: side by side the hosts' batches are the batch that one host would have. Batch k depends on `config.seed` and
    k alone, not on the number of hosts, threads or workers, nor on where the stream was entered; `start_step` costs
    the same wherever it lies.

    Args:
      config: reads `seed`, `batch_size` (global) and, in `data`, `image_size` (int or (height, width)), `crop_scale`,
        `crop_ratio`, `flip` (probability), `threads` and `workers`. With `workers` > 0 the calling program needs
        `if __name__ == "__main__":`, since the workers are spawned.
      source: see `open_source`.
      start_step: first batch to return; a resumed run passes its step.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      An iterator, with `close()`, of {"image": uint8 [b, height, width, 3], "label": int32 [b]}, where b is
      batch_size // process_count.

    Raises:
      ValueError: `batch_size` is no multiple of `process_count`. From the iterator: a record that cannot be decoded,
        with its split and index.
    """
    rows = _host_rows("batch_size", config.batch_size, process_index, process_count)
    load = functools.partial(
        _train_example,
        source=source,
        size=config.data.image_size,
        scale=tuple(config.data.crop_scale),
        ratio=tuple(config.data.crop_ratio),
        flip=config.data.flip,
    )
    # random_map hands out a generator keyed by the position in the endless stream, so an image is cropped anew in each
    # epoch. It must come before the choice of the host's rows, which renumbers positions.
    examples = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat().random_map(load)
    mine = _HostRows(examples, rows, process_index, process_count, start_step)
    return BatchIterator(mine, rows, config.data.threads, config.data.workers, endless=True)


def make_eval(config, source: Source, process_index: int = 0, process_count: int = 1) -> "EvalBatches":
    """Returns one host's share of a split, in order, every example exactly once over all hosts.

    Rows are dealt to hosts as in `make_train`. The end is padded with black images, label 0 and mask False, so that
    all hosts see the same number of batches, all of the same shape.

    Args:
      config: reads `eval.batch_size` (global) and, in `data`, `image_size`, `eval_crop`, `threads` and `workers`.
      source: see `open_source`.
      process_index: this host.
      process_count: number of hosts.

    Returns:
      A sized iterable, to be walked as often as wanted, of {"image": uint8 [b, height, width, 3], "label": int32 [b],
      "mask": bool [b]}, where b is eval.batch_size // process_count.

    Raises:
      ValueError: as `make_train`.
    """
    rows = _host_rows("eval.batch_size", config.eval.batch_size, process_index, process_count)
    load = functools.partial(_eval_example, source=source, size=config.data.image_size, crop=config.data.eval_crop)
    padded = -(-len(source) // config.eval.batch_size) * config.eval.batch_size
    mine = _HostRows(grain.MapDataset.range(padded).map(load), rows, process_index, process_count)
    return EvalBatches(mine, rows, config.data.threads, config.data.workers)


class EvalBatches:
    """A sized, re-iterable run of batches; every `iter` starts from the first one."""

    def __init__(self, examples: grain.MapDataset, rows: int, threads: int, workers: int):
        self._examples = examples
        self._rows = rows
        self._threads = threads
        self._workers = workers

    def __len__(self) -> int:
        return len(self._examples) // self._rows

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._examples, self._rows, self._threads, self._workers, endless=False)


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
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
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


class _HostRows(grain.MapDataset):
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


def _host_rows(key: str, batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, process_count = {process_count}).")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"{key}: {batch_size} is no positive multiple of the number of hosts, {process_count}.")
    return batch_size // process_count


def _train_example(
    index: int,
    rng: np.random.Generator,
    *,
    source: Source,
    size: augment.Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> Batch:
    image, label = _read(source, index)
    image = augment.random_resized_crop(image, size, scale, ratio, rng)
    image = augment.random_flip(image, flip, rng)
    return {"image": np.asarray(image), "label": np.int32(label)}


def _eval_example(index: int, *, source: Source, size: augment.Size, crop: float) -> Batch:
    if index < len(source):
        image, label = _read(source, index)
        image = augment.eval_crop(image, size, crop)
    else:
        height, width = augment.height_width(size)
        image, label = Image.new("RGB", (width, height)), 0
    return {"image": np.asarray(image), "label": np.int32(label), "mask": np.bool_(index < len(source))}


def _read(source: Source, index: int) -> tuple[Image.Image, int]:
    try:
        record = source[index]
        return augment.decode(record["image"]), record["label"]
    # Broad: whatever a damaged file makes the reader raise, the message must say which record it was.
    except Exception as error:
        raise ValueError(f"{source.name!r}, split {source.split!r}, index {index}: {error}") from error
