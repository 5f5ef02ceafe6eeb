"""The training loop, and evaluation of what it saved."""

import json
import logging
import time
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vitpyramid import data
from vitpyramid.models.registry import get_variant
from vitpyramid.train import checkpoint
from vitpyramid.train.config import ConfigError
from vitpyramid.train.mesh import batch_sharding, make_mesh, to_devices
from vitpyramid.train.preemption import stop_requests
from vitpyramid.train.program import (
    Program,
    build,
    compile_eval_step,
    compile_train_step,
    empty_eval_metrics,
    use_compile_cache,
)
from vitpyramid.train.progress import Progress, Summary
from vitpyramid.train.state import TrainState, create_state, with_weights
from vitpyramid.train.writer import MetricWriter, format_seconds, write_atomically
from vitpyramid.weights import load_pretrained

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path, allow_config_change: bool = False) -> Summary:
    """Trains, from the last complete checkpoint in `workdir` if there is one.

    Args:
      config: checked by `train.config.validate`.
      workdir: gets `config.json`, `checkpoints/`, `tensorboard/` and `metrics.jsonl`.
      allow_config_change: go on from a checkpoint although it was saved with another config.

    Raises:
      ConfigError: the config does not fit the data, or contradicts the checkpoint.
      NonFiniteError: the loss or gradient stopped being finite; what was saved before is untouched.
    """
    checkpoint.check_is_no_conversion(workdir)
    use_compile_cache(config.compile_cache)
    mesh = make_mesh(config.mesh.fsdp)
    hosts = (jax.process_index(), jax.process_count())
    with (
        stop_requests() as stop_requested,
        jax.set_mesh(mesh),
        checkpoint.open_checkpoints(workdir, config.checkpoint.keep) as checkpoints,
    ):
        train_source = _open_source(config, config.data.train_split)
        eval_source = _open_source(config, config.data.eval_split)
        teacher = _load_weights(config, "distill.teacher") if config.distill.teacher else None
        program = build(config, len(train_source), mesh, teacher)
        start, total = checkpoints.latest_step() or 0, program.horizon.total_steps
        if start and not allow_config_change:
            checkpoint.check_continues(checkpoints, start, config, len(train_source))
        if start > total:
            raise ConfigError(f"epochs = {config.epochs}: expected {start} steps or more, {workdir} has taken those")
        try:
            train_batches = data.make_train(config, train_source, start, *hosts)
            eval_batches = data.make_eval(config, eval_source, *hosts)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        train_batches = to_devices(train_batches, batch_sharding(mesh))
        write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        _describe(config, program, mesh, len(train_source), len(eval_source), start)
        weights = _load_weights(config, "init") if config.init and not start else None

        compiling = time.perf_counter()
        train_step = compile_train_step(config, program, mesh)
        eval_step = compile_eval_step(config, program, mesh)
        if start:
            state = checkpoint.restore(checkpoints, start, program.state)
        else:
            state = create_state(program.init, program.state)
            if weights is not None:
                state = with_weights(state, weights[1], program.model)
        teacher_variables = jax.tree.map(
            lambda leaf, to: jax.device_put(leaf, to.sharding), teacher[1] if teacher else {}, program.teacher
        )
        compile_seconds = time.perf_counter() - compiling

        eval_every = program.horizon.steps(config.eval.every_epochs)
        save_every = program.horizon.steps(config.checkpoint.every_epochs)
        writer = MetricWriter(workdir, start)
        progress = Progress(config, start, total, writer, checkpoints)
        metrics, stop = {}, False

        for step in range(start, total + 1):
            if step == total or (step > start and step % eval_every == 0):
                progress.flush(step)
                metrics = evaluate(eval_step, state, eval_batches, mesh)
                progress.evaluated(step, metrics)
            if step > start and (step == total or step % save_every == 0 or stop):
                progress.flush(step)
                checkpoint.save(checkpoints, state, config, len(train_source))
                progress.resume_clock()
            if step == total or stop:
                break
            state, step_metrics = train_step(state, next(train_batches), teacher_variables)
            progress.add(step + 1, step_metrics)
            stop = stop_requested(step + 1)
        writer.close()
    return Summary(step, total, metrics, progress.images_per_second, compile_seconds)


def evaluate_checkpoint(config: ConfigDict, workdir: Path) -> tuple[int, dict[str, float]]:
    """Evaluates the newest checkpoint in `workdir`, or converted weights, on `data.eval_split`.

    Returns the checkpoint's step and the metrics.
    """
    use_compile_cache(config.compile_cache)
    mesh = make_mesh(config.mesh.fsdp)
    with jax.set_mesh(mesh), checkpoint.open_checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ConfigError(f"--workdir={workdir}: expected a folder with a complete checkpoint in checkpoints/")
        eval_source = _open_source(config, config.data.eval_split)  # which may say the number of classes
        has_average = checkpoint.check_evaluates(checkpoints, step, config)
        program = build(config, len(eval_source), mesh)  # evaluation does not ask how long training was
        eval_step = compile_eval_step(config, program, mesh)
        state = program.state
        average = state.variables if has_average else {}
        saved = checkpoint.restore(
            checkpoints, step, {"params": state.params, "model_state": state.model_state, "ema": average}
        )
        state = state.replace(**saved)
        batches = data.make_eval(config, eval_source, jax.process_index(), jax.process_count())
        return step, evaluate(eval_step, state, batches, mesh)


def evaluate(eval_step, state: TrainState, batches, mesh: Mesh) -> dict[str, float]:
    """Loss, top-1 and top-5 (as fractions) over every example once; with an average kept, `ema_` ones beside them."""
    results = {}
    for prefix, variables in (("", state.variables), ("ema_", state.ema)):
        if not variables:
            continue
        metrics = empty_eval_metrics(mesh)
        begin = reported = time.perf_counter()
        for done, batch in enumerate(to_devices(batches, batch_sharding(mesh)), start=1):
            metrics = eval_step(variables, metrics, batch)
            now = time.perf_counter()
            if now - reported > 10:
                reported = now
                eta = format_seconds((len(batches) - done) * (now - begin) / done)
                log.info("evaluating: batch %d/%d  ETA %s", done, len(batches), eta)
        values = {prefix + name: float(value) for name, value in jax.device_get(metrics).compute().items()}
        results |= {name: value for name, value in values.items() if value or not name.endswith("skipped")}
    return results


def _load_weights(config: ConfigDict, key: str) -> tuple[nn.Module, dict]:
    """The weights to start from, with the config's head and size, or the teacher's, as they are."""
    path = config.init if key == "init" else config.distill.teacher
    log.info("reading %s: %s", key, path)
    try:
        if key == "init":
            return load_pretrained(
                path,
                config.model.name,
                num_classes=config.model.num_classes,
                image_size=config.data.image_size,
                seed=config.seed,
            )
        return load_pretrained(path, config.distill.model or None)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key} = {path!r}: {error}") from error


def _open_source(config: ConfigDict, split: str) -> data.Source:
    """The source of a split. The config's number of classes is checked against it, or set where it is 0."""
    try:
        source = data.open_source(config.data, split)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not config.model.num_classes:
        config.model.num_classes = source.num_classes
    if source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes = {config.model.num_classes}: expected {source.num_classes}, "
            f"as data.name = {config.data.name!r} has"
        )
    return source


def _describe(config: ConfigDict, program: Program, mesh: Mesh, num_train: int, num_eval: int, start: int) -> None:
    """Says what is about to happen."""
    params = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    published = get_variant(config.model.name).params
    log.info(
        "%s, %s parameters%s, on %s: %d training and %d evaluation images",
        config.model.name,
        f"{params:,}",
        "" if params == published else f" ({published:,} at its own number of classes and input size)",
        config.data.name,
        num_train,
        num_eval,
    )
    log.info(
        "%d steps of %d images (%d an epoch) on mesh data=%d, fsdp=%d; %s",
        program.horizon.total_steps,
        config.batch_size,
        program.horizon.steps_per_epoch,
        mesh.shape["data"],
        mesh.shape["fsdp"],
        f"going on from step {start}" if start else "from the start",
    )
