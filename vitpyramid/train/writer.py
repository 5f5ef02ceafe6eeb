"""Where a run's numbers go: the console, TensorBoard events and a file of JSON lines, all from the first process."""

import json
import logging
import os
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

log = logging.getLogger(__name__)


def format_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 20 s`, `5 h 02 min`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader never sees half of it; from the first process only."""
    if jax.process_index():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


class MetricWriter:
    """Scalars to `WORKDIR/tensorboard` and `WORKDIR/metrics.jsonl`.

    What an earlier run wrote for steps after `start_step` is dropped: those steps are about to be taken again.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
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

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            self._events.close()


def _step_of(line: str) -> float:
    """The step of a JSON line; a line cut off by a kill belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
