"""Turns the metrics of each step into lines, curves and an early end when they stop being finite."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vitpyramid.progress import format_seconds
from vitpyramid.tasks.metrics import Sum, compute, merge
from vitpyramid.tasks.task import Task
from vitpyramid.train.writer import MetricWriter, read_history

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
      step, total_steps: steps taken so far, and when the run is finished; fewer if it was asked to stop.
      metrics: of the last evaluation; empty if there was none.
      examples_per_second: of training, over all devices, without compilation, evaluation and saving.
      compile_seconds: tracing and compiling (or reading from the cache).
      workdir: where it is written down.
      totals: what training counted over all steps, those before a resumption included: `skipped` images, `dropped`
        objects; each time an image comes counts.
      best_step, best: which of its evaluations, those before a resumption included, was the best, and that one's
        metrics; None and empty if there was none. A checkpoint of that step may be gone (`checkpoint.keep`).
    """

    step: int
    total_steps: int
    metrics: dict[str, float]
    examples_per_second: float
    compile_seconds: float
    workdir: Path
    totals: dict[str, float]
    best_step: int | None
    best: dict[str, float]

    @property
    def finished(self) -> bool:
        """Whether all steps were taken and the last evaluation is complete."""
        return self.step == self.total_steps and bool(self.metrics)

    @property
    def history(self) -> list[dict]:
        """What was measured, from the first step on, as `read_history` gives it."""
        return read_history(self.workdir)


class Report:
    """Collects what each step measured and reports it every `log.every_steps` steps.

    Metrics stay on the devices until they are reported, so that the loop never waits for a step to end.
    """

    def __init__(self, task: Task, start: int, total: int, writer: MetricWriter, checkpoints: ocp.CheckpointManager):
        self._task, self._total = task, total
        self._writer, self._checkpoints = writer, checkpoints
        self._window, self._waits = [], []
        # Says when a step has ended, which the loop does not wait for.
        self._watch, self._ended = futures.ThreadPoolExecutor(1), None
        self._reported = start
        self._last_finite = {}
        self._examples, self._seconds = 0, 0.0
        self._clock = time.perf_counter()

    @property
    def examples_per_second(self) -> float:
        """Of training since the run started or resumed."""
        return self._examples / self._seconds if self._seconds else 0.0

    def add(self, step: int, metrics) -> None:
        """Takes the metrics of the step that led to `step`."""
        self._window.append(metrics)
        self._ended = self._watch.submit(lambda: jax.block_until_ready(metrics) and time.perf_counter())
        if step % self._task.config.log.every_steps == 0:
            self.flush(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what is done inside, as far as the devices have no step to work on meanwhile."""
        began = time.perf_counter()
        yield
        self._waits.append((began, self._ended, time.perf_counter()))

    def flush(self, step: int) -> None:
        """Waits for the steps so far and reports them. Raises `NonFiniteError` if one of them was not finite."""
        if not self._window:
            return
        collected = jax.device_get(self._window)
        seconds = time.perf_counter() - self._clock
        idle = sum(max(0, end - max(began, ended.result() if ended else 0)) for began, ended, end in self._waits)
        self._window, self._waits, self._ended = [], [], None
        self._check_finite(collected)
        examples = len(collected) * self._task.config.batch_size
        measured = functools.reduce(merge, collected)
        means = compute(measured)
        earlier = self._writer.totals
        totals = {name: earlier.get(name, 0.0) + means[name] for name in measured if isinstance(measured[name], Sum)}
        self._last_finite = means
        self._reported = step
        self._examples += examples
        self._seconds += seconds
        each, waited = seconds / len(collected), idle / len(collected)
        speed = {f"{self._task.unit}_per_second": examples / seconds, "step_seconds": each, "wait_seconds": waited}
        self._writer.write_training(step, means | speed, earlier | totals)
        remaining = (self._total - step) * self._task.config.batch_size / self.examples_per_second
        log.info(
            f"step {step:{len(str(self._total))}d}/{self._total}  {self._task.words(means)}  lr {means['lr']:.2e}  "
            f"grad norm {means['grad_norm']:.3g}  {examples / seconds:.0f} {self._task.unit}/s  "
            f"{each:.3f} s/step ({waited:.3f} waiting for data)  ETA {format_seconds(remaining)}"
        )
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """Reports the steps so far; what is done inside is left out of the training speed."""
        self.flush(step)
        yield
        self._clock = time.perf_counter()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Reports an evaluation; nothing if it has no metrics."""
        if not metrics:
            return
        self._writer.write_evaluation(step, metrics)
        best_step, best = self.best()
        best = "" if best_step == step else f"  (best {self._task.best} at step {best_step}: {self._task.words(best)})"
        log.info("evaluation at step %d: %s%s", step, self._task.words(metrics), best)

    def best(self) -> tuple[int | None, dict[str, float]]:
        """The step of the best evaluation so far, and its metrics."""
        evaluations = self._writer.evaluations.items()
        return max(evaluations, key=lambda item: item[1][self._task.best], default=(None, {}))

    def _check_finite(self, collected: list) -> None:
        for offset, metrics in enumerate(collected, start=1):
            values = compute(metrics)
            if not all(map(math.isfinite, (values["loss"], values["grad_norm"]))):
                saved = self._checkpoints.latest_step()
                where = "none was saved" if saved is None else f"{self._checkpoints.directory}/{saved}"
                raise NonFiniteError(
                    f"step {self._reported + offset}: loss {values['loss']}, gradient norm {values['grad_norm']}. "
                    f"Last finite metrics: {self._last_finite or 'none'}. Last good checkpoint: {where}."
                )
            self._last_finite = values


def format_summary(summary: Summary, task: Task, workdir: Path, command: str) -> str:
    """The last lines of a run; `command` is the one that started it."""
    speed, counted = summary.examples_per_second, task.words(summary.totals)
    lines = [
        ("finished" if summary.finished else "stopped", f"after step {summary.step} of {summary.total_steps}"),
        ("result", task.words(summary.metrics) if summary.metrics else "not evaluated yet"),
        *([("left out", f"{counted}, over all steps")] if counted else []),
        ("training", f"{speed:.0f} {task.unit}/s" if speed else "nothing to do"),
        ("compiling", f"{summary.compile_seconds:.1f} s"),
        ("checkpoints", f"{workdir}/checkpoints"),
        ("curves", f"{workdir}/tensorboard (pip install tensorboard; tensorboard --logdir={workdir})"),
        ("next", f"{command} --mode=eval" if summary.finished else f"{command} goes on from here"),
    ]
    return "\n" + "\n".join(f"{name:12s} {text}" for name, text in lines)
