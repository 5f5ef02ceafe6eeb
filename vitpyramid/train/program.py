"""A task as compiled programs: what the loop runs, the benchmark times and the preflight compiles."""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import platformdirs
from jax.sharding import Mesh

from vitpyramid.tasks.task import ConfigError, Task
from vitpyramid.train.optim import make_optimizer
from vitpyramid.train.schedule import Horizon, make_schedule
from vitpyramid.train.sharding import abstract_state, batch_sharding, replicated
from vitpyramid.train.state import TrainState, initial_state, initial_variables
from vitpyramid.train.step import make_eval_step, make_train_step

log = logging.getLogger(__name__)


class Program(NamedTuple):
    """A run's functions and the shapes, dtypes and shardings of what they take.

    Attributes:
      horizon: length of the run.
      init: `() -> TrainState` of step 0.
      state: abstract: of a `TrainState`.
      constants: abstract: what the task's steps never change.
      train_step: `(state, batch, constants) -> (state, metrics)`.
    """

    horizon: Horizon
    init: Callable[[], TrainState]
    state: TrainState
    constants: dict
    train_step: Callable


def build(task: Task, mesh: Mesh) -> Program:
    """The training program of a task on a mesh; nothing is computed or compiled.

    Raises:
      ConfigError: `optim.lr_rules` do not fit the network's parameters.
    """
    config, model = task.config, task.model
    horizon = Horizon.of(config, task.num_examples())
    variables = abstract_variables(task, mesh)
    try:
        optimizer = make_optimizer(config, horizon, variables["params"], model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    start = functools.partial(initial_state, tx=optimizer.tx, average=config.ema.decay > 0)
    return Program(
        horizon=horizon,
        init=lambda: start(initial_variables(task, mesh.size)),
        state=abstract_state(mesh, jax.eval_shape(start, variables)),
        constants=abstract_state(mesh, task.constants()),
        train_step=make_train_step(task, optimizer, make_schedule(config, horizon)),
    )


def abstract_variables(task: Task, mesh: Mesh) -> dict:
    """Shapes, dtypes and shardings of the network's variables."""
    return abstract_state(mesh, jax.eval_shape(functools.partial(initial_variables, task, mesh.size)))


def abstract_batch(task: Task, mesh: Mesh, evaluation: bool = False) -> dict:
    """Shapes, dtypes and shardings of a batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), task.batch(evaluation)
    )


def train_step_for(task: Task, program: Program, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple]:
    """The training step for this mesh, to be compiled, and the shapes of what it takes. It takes the state's memory."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))
    return step, (program.state, abstract_batch(task, mesh), program.constants)


def eval_step_for(task: Task, variables: dict, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple]:
    """The evaluation step `(variables, batch) -> metrics` likewise; `variables` are abstract."""
    # Replicated, so that every host reads all of the metrics.
    step = jax.jit(make_eval_step(task), out_shardings=replicated(mesh))
    return step, (variables, abstract_batch(task, mesh, evaluation=True))


def compile_train_step(task: Task, program: Program, mesh: Mesh) -> jax.stages.Compiled:
    """The training step, compiled. It takes the state's memory over."""
    step, shapes = train_step_for(task, program, mesh)
    return compile_logged("train step", step, *shapes)


def compile_eval_step(task: Task, variables: dict, mesh: Mesh) -> jax.stages.Compiled:
    """The evaluation step, compiled."""
    step, shapes = eval_step_for(task, variables, mesh)
    return compile_logged("evaluation step", step, *shapes)


def for_all_shapes(compiled: Callable, what: str, step: jax.stages.Wrapped, shapes: tuple) -> Callable:
    """A step `(state, batch, ...)`, compiled for these shapes, that is compiled again when a batch has others."""
    first, batch, *rest = shapes
    programs = {_shapes_of(batch): compiled}

    def run(state, batch, *others):
        if (key := _shapes_of(batch)) not in programs:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
            programs[key] = compile_logged(what, step, first, like, *rest)
        return programs[key](state, batch, *others)

    return run


def _shapes_of(batch: dict) -> tuple:
    return tuple(leaf.shape for _, leaf in sorted(batch.items()))


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("auto": the user's cache folder, "": nowhere) for later runs."""
    if folder == "auto":
        folder = str(Path(platformdirs.user_cache_dir("vitpyramid")) / "compiled")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compile_logged(what: str, function: jax.stages.Wrapped, *args) -> jax.stages.Compiled:
    """A function compiled for arguments of these shapes, with lines that say so and how long it took."""
    start = time.perf_counter()
    lowered = function.lower(*args)
    log.info("compiling the %s ...", what)
    compiled = lowered.compile()
    log.info("compiled the %s in %.1f s", what, time.perf_counter() - start)
    return compiled
