"""Where a run's numbers go: the console, TensorBoard events and a file of JSON lines, all from the first process."""

import json
import logging
import math
import uuid
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from vitpyramid.files import write_atomically

log = logging.getLogger(__name__)

_UNREADABLE = {"step": math.inf}
_EVALUATION = "eval/"  # begins the names of an evaluation's metrics


class MetricWriter:
    """Scalars to `WORKDIR/tensorboard` and `WORKDIR/metrics.jsonl`.

    What an earlier run wrote for steps after `start_step` is dropped: those steps are about to be taken again.

    Attributes:
      evaluations: the metrics of each evaluation by its step, those of earlier runs included.
    """

    def __init__(self, workdir: Path, start_step: int):
        path = workdir / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        records = [_parse(line) for line in lines]
        kept = [record for record in records if record["step"] <= start_step]
        self.evaluations = {record["step"]: metrics for record in kept if (metrics := _strip(record))}
        self._active = jax.process_index() == 0
        if not self._active:
            return
        if _UNREADABLE in records[:-1]:  # the last line may have been cut off by a kill
            damaged = path.with_name(f"metrics.damaged-{uuid.uuid4().hex[:8]}.jsonl")
            damaged.write_bytes(path.read_bytes())
            log.warning("%s has lines that cannot be read; it is kept as %s", path, damaged.name)
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes scalars of one step, to be seen at once."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self.evaluations[step] = metrics
        self.write(step, {_EVALUATION + name: value for name, value in metrics.items()})

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            self._events.close()


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
