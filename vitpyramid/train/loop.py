"""The training loop, and evaluation of what it saved."""

import collections
import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from vitpyramid.files import write_atomically
from vitpyramid.progress import with_progress
from vitpyramid.tasks.metrics import Metrics, compute, merge
from vitpyramid.tasks.task import ConfigError, Task
from vitpyramid.train import checkpoint
from vitpyramid.train.preemption import stop_requests
from vitpyramid.train.profile import profiled
from vitpyramid.train.program import (
    Program,
    abstract_variables,
    build,
    compile_eval_step,
    compile_train_step,
    eval_step_for,
    for_all_shapes,
    train_step_for,
    use_compile_cache,
)
from vitpyramid.train.report import Report, Summary
from vitpyramid.train.sharding import batch_sharding, make_mesh, to_devices
from vitpyramid.train.state import create_state, with_weights
from vitpyramid.train.workdir import agreed, held
from vitpyramid.train.writer import MetricWriter
from vitpyramid.weights import store
from vitpyramid.weights.intact import newest_intact

log = logging.getLogger(__name__)


def train(
    task: Task, workdir: Path, allow_config_change: bool = False, callback: Callable[[dict], None] | None = None
) -> Summary:
    """Trains, from the last complete checkpoint in `workdir` if there is one.

    Args:
      workdir: gets `config.json`, `checkpoints/`, `tensorboard/` and `metrics.jsonl`.
      allow_config_change: go on from a checkpoint although it was saved with another config.
      callback: called on the first process with each line of `metrics.jsonl` as it is written.

    Raises:
      ConfigError: the config does not fit the data, or contradicts the checkpoint; another run holds `workdir`.
      OSError: no checkpoint is intact, or a file cannot be read or written.
      NonFiniteError: the loss or gradient stopped being finite; what was saved before is untouched.
    """
    config = task.config
    checkpoint.check_is_no_conversion(workdir)
    use_compile_cache(config.compile_cache)
    mesh = make_mesh(config.mesh.fsdp)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        check_held = stack.enter_context(held(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        start = agreed(lambda: newest_intact(workdir / store.FOLDER, set_aside=True)) or 0
        checkpoints = stack.enter_context(store.open_checkpoints(workdir, config.checkpoint.keep, background=True))
        program = build(task, mesh)
        total = program.horizon.total_steps
        if start:
            if not allow_config_change:
                checkpoint.check_continues(checkpoints, start, task)
            checkpoint.check_fits(checkpoints, start, program.state)
        if start > total:
            raise ConfigError(f"epochs = {config.epochs}: expected {start} steps or more, {workdir} has taken those")
        train_batches = to_devices(task.train_batches(start), batch_sharding(mesh))
        eval_batches = task.eval_batches()
        if jax.process_index() == 0:
            write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        _describe(task, program, mesh, start)
        initial = None if start else task.initial()

        compiling = time.perf_counter()
        train_step = compile_train_step(task, program, mesh)
        eval_step = compile_eval_step(task, program.state.variables, mesh)
        compile_seconds = time.perf_counter() - compiling
        train_step = for_all_shapes(train_step, "train step", *train_step_for(task, program, mesh))
        eval_step = _for_all_shapes(task, eval_step, program.state.variables, mesh)
        if start:
            state = store.restore(checkpoints, start, program.state)
        else:
            state = create_state(program.init, program.state)
            state = with_weights(state, initial) if initial else state
        constants = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), task.constants(), program.constants)

        eval_every = program.horizon.steps(config.eval.every_epochs)
        save_every = program.horizon.steps(config.checkpoint.every_epochs)
        writer = MetricWriter(workdir, start, callback)
        report = Report(task, start, total, writer, checkpoints)
        before_step = stack.enter_context(profiled(config.profile, workdir / "tensorboard"))
        metrics, stop = {}, False

        def save() -> None:
            with report.paused(step):
                check_held()
                writer.sync()  # before the checkpoint, whose run goes on behind these lines
                checkpoint.save(checkpoints, state, task)

        for step in range(start, total + 1):
            if step > start and (step == total or step % save_every == 0):
                save()
            if step == total or (step > 0 and step % eval_every == 0):
                metrics = writer.evaluations.get(step, {})  # where a run was stopped after it
                if not metrics:
                    with report.paused(step):
                        options = eval_batches, mesh, stop_requested
                        measured = measure(eval_step, state.variables, state.ema, *options)
                        metrics = _written(task, measured, workdir)
                    report.evaluated(step, metrics)
            stop = stop_requested()
            if step == total or stop:
                break
            before_step(step - start, state)
            with report.waiting():
                batch = next(train_batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, measured = train_step(state, batch, constants)
            report.add(step + 1, measured)
        if stop and step > (checkpoints.latest_step() or 0):
            save()
        store.finish(checkpoints)
        writer.close()
    speed = report.examples_per_second
    return Summary(step, total, metrics, speed, compile_seconds, workdir, writer.totals, *report.best())


def evaluate_checkpoint(task: Task, workdir: Path) -> tuple[int, dict[str, float]]:
    """Evaluates the newest checkpoint in `workdir`, or converted weights.

    Returns the checkpoint's step and the metrics.
    """
    step, measured = measure_checkpoint(task, workdir)
    return step, _written(task, measured, workdir)


def measure_checkpoint(task: Task, workdir: Path) -> tuple[int, dict[str, Metrics]]:
    """As `evaluate_checkpoint`, with metrics as `measure` gives them."""
    use_compile_cache(task.config.compile_cache)
    mesh = make_mesh(task.config.mesh.fsdp)
    step = agreed(lambda: newest_intact(workdir / store.FOLDER))
    if step is None:
        raise ConfigError(f"--workdir={workdir}: expected a folder with a complete checkpoint in checkpoints/")
    with jax.set_mesh(mesh), store.open_checkpoints(workdir, read_only=True) as checkpoints:
        has_average = checkpoint.check_evaluates(checkpoints, step, task)
        batches = task.eval_batches()
        variables = abstract_variables(task, mesh)
        eval_step = _for_all_shapes(task, compile_eval_step(task, variables, mesh), variables, mesh)
        average = variables if has_average else {}
        model_state = {name: collection for name, collection in variables.items() if name != "params"}
        wanted = {"params": variables["params"], "model_state": model_state, "ema": average}
        saved = store.restore(checkpoints, step, wanted)
        variables = {"params": saved["params"], **saved["model_state"]}
        return step, measure(eval_step, variables, saved["ema"], batches, mesh)


def measure(
    eval_step: Callable, variables: dict, average: dict, batches, mesh: Mesh, stop_requested: Callable = lambda: False
) -> dict[str, Metrics]:
    """The metrics of a network over every example once, as "", and of an average of its variables, if any, as "ema_".

    Empty if a stop was requested before the end.
    """
    results = {}
    for prefix, weights in (("", variables), ("ema_", average)):
        if not weights:
            continue
        measured, waiting = None, collections.deque()
        on_devices = to_devices(batches, batch_sharding(mesh))
        for batch in with_progress(on_devices, len(batches), f"evaluating {prefix}".rstrip(" _")):
            waiting.append(eval_step(weights, batch))
            if len(waiting) > 2:  # the devices are never waited for, nor far ahead
                measured = _merged(measured, waiting.popleft())
            if stop_requested():
                return {}
        measured = functools.reduce(_merged, waiting, measured)
        results[prefix] = measured
    return results


def numbers(measured: dict[str, Metrics]) -> dict[str, float]:
    """The values of what `measure` gives, by prefix and name."""
    return {prefix + name: value for prefix, one in measured.items() for name, value in compute(one).items()}


def _for_all_shapes(task: Task, eval_step: Callable, variables: dict, mesh: Mesh) -> Callable:
    return for_all_shapes(eval_step, "evaluation step", *eval_step_for(task, variables, mesh))


def _written(task: Task, measured: dict[str, Metrics], workdir: Path) -> dict[str, float]:
    """The `numbers`; the task's files of them are written into `workdir`."""
    if jax.process_index() == 0:
        for prefix, one in measured.items():
            for name, text in task.files(one).items():
                write_atomically(workdir / f"{prefix}{name}", text)
    return numbers(measured)


def _merged(measured: Metrics | None, more: Metrics) -> Metrics:
    more = jax.device_get(more)
    return more if measured is None else merge(measured, more)


def _describe(task: Task, program: Program, mesh: Mesh, start: int) -> None:
    """Says what is about to happen."""
    log.info(
        "%s: %s parameters, %s training %s",
        task.title,
        f"{sum(leaf.size for leaf in jax.tree.leaves(program.state.params)):,}",
        f"{task.num_examples():,}",
        task.unit,
    )
    log.info(
        "%d steps of %d %s (%d an epoch) on mesh data=%d, fsdp=%d; %s",
        program.horizon.total_steps,
        task.config.batch_size,
        task.unit,
        program.horizon.steps_per_epoch,
        mesh.shape["data"],
        mesh.shape["fsdp"],
        f"going on from step {start}" if start else "from the start",
    )
