"""Where a run's numbers go: the console, TensorBoard events and a file of JSON lines, all from the first process."""

import json
import logging
import math
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
from tensorboardX import SummaryWriter, record_writer

from vitpyramid.files import in_bucket, write_atomically

log = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
_UNREADABLE = {"step": math.inf}
_TRAINING, _EVALUATION = "train/", "eval/"  # begin the names of what a step and an evaluation measured
_TOTAL = "_total"  # ends the names of what is counted over all steps
_PAUSE = 5.0  # seconds between two writings of an object; a bucket takes one a second


class GrowingObject:
    """A file in a bucket that is written to at its end. Objects cannot grow: it is written anew, in the background."""

    def __init__(self, path: str, content: bytes = b""):
        self._path, self._content, self._written = path, bytearray(content), len(content)
        self._writing, self._changed, self._closed = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_changes, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Adds to the end."""
        self._content += data

    def flush(self) -> None:
        """Has what was added written soon."""
        self._changed.set()

    def sync(self) -> None:
        """Waits until all is written. Raises `OSError` if it cannot be."""
        with self._writing:
            if self._written < len(self._content):
                content = bytes(self._content)
                write_atomically(self._path, content)
                self._written = len(content)

    def close(self) -> None:
        """The last `sync`."""
        self._closed.set()
        self._changed.set()
        self._thread.join()
        self.sync()

    def _write_changes(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            try:
                self.sync()
            except OSError as error:
                log.warning("not written yet: %s", error)
            self._closed.wait(_PAUSE)


class _Events(GrowingObject):
    """A file of TensorBoard events, which a run can do without."""

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            log.warning("the last events are missing: %s", error)


class _EventFiles:
    """Where tensorboardX has the files of buckets from. Its own are written where the training step waits for them."""

    open = _Events

    def directory_check(self, path: str) -> None:
        """There are no folders in buckets."""


record_writer.register_writer_factory("gs", _EventFiles())


class MetricWriter:
    """Scalars to `WORKDIR/tensorboard` and `WORKDIR/metrics.jsonl`.

    What an earlier run wrote for steps after `start_step` is dropped: those steps are about to be taken again.
    In a bucket both are written in the background; `sync` waits for the lines. `callback` gets each line as a dict.

    Attributes:
      evaluations: the metrics of each evaluation by its step, those of earlier runs included.
      totals: by name, what earlier runs counted in all up to `start_step`: of lines with `train/NAME_total` the last.
    """

    def __init__(self, workdir: Path, start_step: int, callback: Callable[[dict], None] | None = None):
        path = workdir / HISTORY
        records = _read(path)
        self._callback = callback
        kept = [record for record in records if record["step"] <= start_step]
        self.evaluations = {record["step"]: metrics for record in kept if (metrics := _strip(record))}
        self.totals = {
            name.removeprefix(_TRAINING).removesuffix(_TOTAL): value
            for record in kept
            for name, value in record.items()
            if name.startswith(_TRAINING) and name.endswith(_TOTAL)
        }
        self._active = jax.process_index() == 0
        if not self._active:
            return
        if _UNREADABLE in records[:-1]:  # the last line may have been cut off by a kill
            damaged = path.with_name(f"metrics.damaged-{uuid.uuid4().hex[:8]}.jsonl")
            damaged.write_bytes(path.read_bytes())
            log.warning("%s has lines that cannot be read; it is kept as %s", path, damaged.name)
        content = "".join(f"{json.dumps(record)}\n" for record in kept).encode()
        write_atomically(path, content)
        self._lines = GrowingObject(str(path), content) if in_bucket(path) else path.open("ab")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars of one step, to be seen at once."""
        if not self._active:
            return
        self._lines.write(f"{json.dumps({'step': step, **scalars})}\n".encode())
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if self._callback:
            self._callback({"step": step, **scalars})

    def write_training(self, step: int, metrics: dict[str, float], totals: dict[str, float]) -> None:
        """Writes what training measured since the line before, and what it counted since the first step."""
        self.totals = totals
        named = metrics | {name + _TOTAL: value for name, value in totals.items()}
        self.write(step, {_TRAINING + name: value for name, value in named.items()})

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self.evaluations[step] = metrics
        self.write(step, {_EVALUATION + name: value for name, value in metrics.items()})

    def sync(self) -> None:
        """Waits until the lines are where the next run finds them. Raises `OSError` if they cannot be written."""
        if self._active and isinstance(self._lines, GrowingObject):
            self._lines.sync()

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            self._events.close()


def read_history(workdir: Path) -> list[dict]:
    """What a run has measured so far: the lines of its `metrics.jsonl`, in their order; none if there is no file.

    Each is `{"step": int, "train/loss": float, ...}`, means over the steps since the line before, or of an evaluation
    `{"step": int, "eval/loss": float, ...}`. What is counted, `train/skipped` and `train/dropped`, is a sum over these
    steps, and `train/dropped_total` that over all steps so far.
    """
    return [record for record in _read(workdir / HISTORY) if record is not _UNREADABLE]


def _read(path: Path) -> list[dict]:
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    return [_parse(line) for line in lines]


def _parse(line: str) -> dict:
    """A JSON line; one that cannot be read belongs to no step that is kept."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else _UNREADABLE
    except (ValueError, KeyError, TypeError):
        return _UNREADABLE


def _strip(record: dict) -> dict[str, float]:
    """The metrics of an evaluation; none if it was a line of training."""
    return {name.removeprefix(_EVALUATION): value for name, value in record.items() if name.startswith(_EVALUATION)}
