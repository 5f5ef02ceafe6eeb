"""A config as compiled programs: what the loop runs, the benchmark times and the preflight compiles."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import platformdirs
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vitpyramid.train import mesh as meshes
from vitpyramid.train.config import ConfigError
from vitpyramid.train.mesh import batch_sharding
from vitpyramid.train.metrics import EvalMetrics
from vitpyramid.train.optim import make_optimizer
from vitpyramid.train.schedule import Horizon, make_schedule
from vitpyramid.train.state import abstract_state, init_function, model_from_config
from vitpyramid.train.step import make_eval_step, make_train_step

log = logging.getLogger(__name__)


class Program(NamedTuple):
    """The functions of a run.

    Attributes:
      model: the network.
      horizon: length of the run.
      init: `() -> TrainState` of step 0.
      state: shapes, dtypes and shardings of the state.
      teacher: shapes, dtypes and shardings of the teacher's variables; empty without one.
      train_step: `(state, batch, teacher_variables) -> (state, metrics)`.
      eval_step: `(variables, metrics, batch) -> metrics`.
    """

    model: nn.Module
    horizon: Horizon
    init: Callable
    state: Any
    teacher: dict
    train_step: Callable
    eval_step: Callable


def build(config: ConfigDict, num_examples: int, mesh: Mesh, teacher: tuple[nn.Module, dict] | None = None) -> Program:
    """The program of a config for a training split of `num_examples`; nothing is computed or compiled.

    `teacher` is what `load_pretrained` returns, for distillation.

    Raises:
      ConfigError: `optim.lr_rules` do not fit the network's parameters, or the teacher has other classes.
    """
    model = model_from_config(config)
    horizon = Horizon.of(config, num_examples)
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((jax.device_count(), size, size, 3), model.dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    try:
        optimizer = make_optimizer(config, horizon, params, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    teacher_model, teacher_variables = teacher or (None, {})
    if teacher_model is not None:
        if teacher_model.num_classes != config.model.num_classes:
            raise ConfigError(
                f"distill.teacher = {config.distill.teacher!r}: expected {config.model.num_classes} classes, as "
                f"model.num_classes, it has {teacher_model.num_classes}"
            )
        teacher_model = teacher_model.clone(dtype=model.dtype)
    init = init_function(config, model, optimizer.tx)
    return Program(
        model=model,
        horizon=horizon,
        init=init,
        state=abstract_state(init, mesh),
        teacher=_abstract(mesh, teacher_variables),
        train_step=make_train_step(config, model, optimizer, make_schedule(config, horizon), teacher_model),
        eval_step=make_eval_step(config, model),
    )


def abstract_batch(config: ConfigDict, mesh: Mesh, evaluation: bool = False) -> dict:
    """Shapes, dtypes and shardings of a batch on the devices."""
    size = config.data.image_size
    count = config.eval.batch_size if evaluation else config.batch_size
    shapes = {"image": ((count, size, size, 3), "uint8"), "label": ((count,), "int32")}
    if evaluation:
        shapes["mask"] = ((count,), "bool")
    if config.data.on_corrupt == "skip":
        shapes["skipped"] = ((count,), "bool")
    sharding = batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for k, (shape, dtype) in shapes.items()}


def compile_train_step(config: ConfigDict, program: Program, mesh: Mesh) -> jax.stages.Compiled:
    """The training step for this mesh. It takes the state's memory over."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(state_shardings, _replicated(mesh)))
    return _compile("train step", step, program.state, abstract_batch(config, mesh), program.teacher)


def compile_eval_step(config: ConfigDict, program: Program, mesh: Mesh) -> jax.stages.Compiled:
    """The evaluation step for this mesh."""
    step = jax.jit(program.eval_step, out_shardings=_replicated(mesh))
    batch = abstract_batch(config, mesh, evaluation=True)
    return _compile("evaluation step", step, program.state.variables, empty_eval_metrics(mesh), batch)


def empty_eval_metrics(mesh: Mesh) -> EvalMetrics:
    """Metrics of no examples, on every device."""
    return jax.device_put(EvalMetrics.empty(), _replicated(mesh))


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` ("auto": the user's cache folder, "": nowhere) for later runs."""
    if folder == "auto":
        folder = str(Path(platformdirs.user_cache_dir("vitpyramid")) / "compiled")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _abstract(mesh: Mesh, variables: dict) -> dict:
    shardings = meshes.state_sharding(mesh, variables)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), variables, shardings)


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _compile(what: str, function, *args) -> jax.stages.Compiled:
    start = time.perf_counter()
    lowered = function.lower(*args)
    log.info("compiling the %s ...", what)
    compiled = lowered.compile()
    log.info("compiled the %s in %.1f s", what, time.perf_counter() - start)
    return compiled
