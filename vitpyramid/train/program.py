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

from vitpyramid.train.mesh import batch_sharding
from vitpyramid.train.metrics import EvalMetrics
from vitpyramid.train.optim import make_optimizer
from vitpyramid.train.schedule import Horizon, warmup_cosine
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
      train_step: `(state, batch) -> (state, metrics)`.
      eval_step: `(variables, metrics, batch) -> metrics`.
    """

    model: nn.Module
    horizon: Horizon
    init: Callable
    state: Any
    train_step: Callable
    eval_step: Callable


def build(config: ConfigDict, num_examples: int, mesh: Mesh) -> Program:
    """The program of a config for a training split of `num_examples`; nothing is computed or compiled."""
    model = model_from_config(config)
    horizon = Horizon.of(config, num_examples)
    schedule = warmup_cosine(config, horizon)
    tx = make_optimizer(config, schedule, model.no_weight_decay)
    init = init_function(config, model, tx)
    return Program(
        model=model,
        horizon=horizon,
        init=init,
        state=abstract_state(init, mesh),
        train_step=make_train_step(config, model, tx, schedule),
        eval_step=make_eval_step(config, model),
    )


def abstract_batch(config: ConfigDict, mesh: Mesh, evaluation: bool = False) -> dict:
    """Shapes, dtypes and shardings of a batch on the devices."""
    size = config.data.image_size
    count = config.eval.batch_size if evaluation else config.batch_size
    shapes = {"image": ((count, size, size, 3), "uint8"), "label": ((count,), "int32")}
    if evaluation:
        shapes["mask"] = ((count,), "bool")
    sharding = batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for k, (shape, dtype) in shapes.items()}


def compile_train_step(config: ConfigDict, program: Program, mesh: Mesh) -> jax.stages.Compiled:
    """The training step for this mesh. It takes the state's memory over."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(state_shardings, _replicated(mesh)))
    return _compile("train step", step, program.state, abstract_batch(config, mesh))


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


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _compile(what: str, function, *args) -> jax.stages.Compiled:
    start = time.perf_counter()
    lowered = function.lower(*args)
    log.info("compiling the %s ...", what)
    compiled = lowered.compile()
    log.info("compiled the %s in %.1f s", what, time.perf_counter() - start)
    return compiled
