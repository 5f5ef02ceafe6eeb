"""Turns the metrics of each step into lines, curves and an early end when they stop being finite."""

import dataclasses
import functools
import logging
import math
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from vitpyramid.train.writer import MetricWriter, format_seconds

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
      step, total_steps: steps taken so far, and when the run is finished; fewer if it was asked to stop.
      metrics: of the last evaluation; empty if there was none.
      images_per_second: of training, over all devices, without compilation, evaluation and saving.
      compile_seconds: tracing and compiling (or reading from the cache).
    """

    step: int
    total_steps: int
    metrics: dict[str, float]
    images_per_second: float
    compile_seconds: float


class Progress:
    """Collects what each step measured and reports it every `log.every_steps` steps.

    Metrics stay on the devices until they are reported, so that the loop never waits for a step to end.
    """

    def __init__(
        self, config: ConfigDict, start: int, total: int, writer: MetricWriter, checkpoints: ocp.CheckpointManager
    ):
        self._every, self._batch_size, self._total = config.log.every_steps, config.batch_size, total
        self._writer, self._checkpoints = writer, checkpoints
        self._window = []
        self._reported = start
        self._last_finite = {}
        self._images, self._seconds = 0, 0.0
        self._clock = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Of training since the run started or resumed."""
        return self._images / self._seconds if self._seconds else 0.0

    def add(self, step: int, metrics) -> None:
        """Takes the metrics of the step that led to `step`."""
        self._window.append(metrics)
        if step % self._every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Waits for the steps so far and reports them. Raises `NonFiniteError` if one of them was not finite."""
        if not self._window:
            return
        collected = jax.device_get(self._window)
        self._window = []
        seconds = time.perf_counter() - self._clock
        self._check_finite(collected)
        images = len(collected) * self._batch_size
        means = functools.reduce(lambda a, b: a.merge(b), collected).compute()
        scalars = {f"train/{name}": float(value) for name, value in means.items()}
        self._last_finite = scalars
        self._reported = step
        self._images += images
        self._seconds += seconds
        scalars |= {"train/images_per_second": images / seconds, "train/step_seconds": seconds / len(collected)}
        self._writer.write(step, scalars)
        remaining = (self._total - step) * self._batch_size / self.images_per_second
        log.info(
            f"step {step:{len(str(self._total))}d}/{self._total}  loss {means['loss']:.4f}  top1 {means['top1']:6.2%}  "
            f"top5 {means['top5']:6.2%}  lr {means['lr']:.2e}  grad norm {means['grad_norm']:.3g}  "
            f"{images / seconds:.0f} images/s  {seconds / len(collected):.3f} s/step  ETA {format_seconds(remaining)}"
            + (f"  {means['skipped']:.0f} images skipped" if means["skipped"] else "")
        )
        self.resume_clock()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Reports an evaluation."""
        self._writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        log.info("evaluation at step %d: %s", step, format_metrics(metrics))
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leaves the time since the last report out of the training speed."""
        self._clock = time.perf_counter()

    def _check_finite(self, collected: list) -> None:
        for offset, metrics in enumerate(collected, start=1):
            values = {name: float(value) for name, value in metrics.compute().items()}
            if not all(map(math.isfinite, (values["loss"], values["grad_norm"]))):
                saved = self._checkpoints.latest_step()
                where = "none was saved" if saved is None else f"{self._checkpoints.directory}/{saved}"
                raise NonFiniteError(
                    f"step {self._reported + offset}: loss {values['loss']}, gradient norm {values['grad_norm']}. "
                    f"Last finite metrics: {self._last_finite or 'none'}. Last good checkpoint: {where}."
                )
            self._last_finite = {f"train/{name}": value for name, value in values.items()}


def format_metrics(metrics: dict[str, float]) -> str:
    """`loss 0.1234, top1 97.50%, ...`"""
    forms = {"loss": ".4f", "skipped": ".0f"}
    return ", ".join(f"{name} {value:{forms.get(name.split('_')[-1], '.2%')}}" for name, value in metrics.items())


def format_summary(summary: Summary, workdir: Path, command: str) -> str:
    """The last lines of a run; `command` is the one that started it."""
    finished = summary.step == summary.total_steps
    lines = [
        ("finished" if finished else "stopped", f"after step {summary.step} of {summary.total_steps}"),
        ("accuracy", format_metrics(summary.metrics) if summary.metrics else "not evaluated yet"),
        (
            "training",
            f"{summary.images_per_second:.0f} images/s" if summary.images_per_second else "nothing to do",
        ),
        ("compiling", f"{summary.compile_seconds:.1f} s"),
        ("checkpoints", f"{workdir}/checkpoints"),
        ("curves", f"{workdir}/tensorboard (pip install tensorboard; tensorboard --logdir={workdir})"),
        ("next", f"{command} --mode=eval" if finished else f"{command} goes on from here"),
    ]
    return "\n" + "\n".join(f"{name:12s} {text}" for name, text in lines)
