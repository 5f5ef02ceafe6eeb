"""What training carries from step to step, and how it starts."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from vitpyramid.tasks.task import Task
from vitpyramid.train.rng import named_key


@flax.struct.dataclass
class TrainState:
    """Everything a step changes.

    Attributes:
      step: steps taken, int32.
      params: parameters, float32.
      model_state: the model's other collections, such as BatchNorm statistics.
      opt_state: optimizer state.
      ema: moving average of `{"params": params, **model_state}`, or an empty dict.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any

    @property
    def variables(self) -> dict:
        """What `model.apply` takes."""
        return {"params": self.params, **self.model_state}


def initial_variables(task: Task, rows: int) -> dict:
    """The network's variables at step 0, to be traced.

    Made for `rows` examples, a multiple of the devices: blocks ask for the batch to be split over all of them.
    """
    inputs = jax.eval_shape(task.prepare_eval, task.batch(True))
    zeros = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), inputs)
    return task.model.init(named_key(task.config.seed, "init"), zeros, method=task.call)


def initial_state(variables: dict, tx: optax.GradientTransformation, average: bool) -> TrainState:
    """The state of step 0 with these variables; `average`: whether a moving average is kept."""
    model_state = {name: collection for name, collection in variables.items() if name != "params"}
    # A copy: the train step takes over the memory of the whole state, and a buffer can be taken once.
    ema = jax.tree.map(jnp.copy, variables) if average else {}
    params = variables["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), ema)


def create_state(init, abstract: TrainState) -> TrainState:
    """The state that `init` makes, made inside jit, already sharded as `abstract` is."""
    # It runs once: on CPU optimising it takes 10 s longer than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()


def with_weights(state: TrainState, variables: dict) -> TrainState:
    """The state with other variables, of the same shapes; a moving average starts from them as well."""

    def put(new: dict, old: dict) -> dict:
        # A copy: the train step donates the state, and on CPU an array may share the memory of numpy's.
        return jax.tree.map(lambda leaf, to: jnp.copy(jax.device_put(leaf, to.sharding)), new, old)

    ema = state.ema and put(variables, state.ema)
    variables = put(variables, state.variables)
    return state.replace(params=variables.pop("params"), model_state=variables, ema=ema)
