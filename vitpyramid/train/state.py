"""What training carries from step to step, and how it starts."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vitpyramid.models.backbone import Backbone
from vitpyramid.models.registry import create_model
from vitpyramid.models.stack import stack_blocks
from vitpyramid.train import mesh as meshes
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


def model_from_config(config: ConfigDict) -> nn.Module:
    """The network of a config."""
    model = config.model
    return create_model(
        model.name,
        num_classes=model.num_classes,
        image_size=config.data.image_size,
        drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
        remat=model.remat,
        scan=model.scan,
        dtype=jnp.dtype(model.dtype),
    )


def init_function(config: ConfigDict, model: nn.Module, tx: optax.GradientTransformation):
    """A function without arguments that makes the state of step 0."""
    size = config.data.image_size
    # One image a device: blocks ask for the batch to be split over all of them.
    image_shape = (jax.device_count(), size, size, 3)
    keep_ema = config.ema.decay > 0

    def init() -> TrainState:
        variables = model.init(named_key(config.seed, "init"), jnp.zeros(image_shape, model.dtype))
        params = variables.pop("params")
        ema = {"params": params, **variables} if keep_ema else {}
        # A copy of its own: the train step donates the whole state, and a buffer can be donated once.
        ema = jax.tree.map(jnp.copy, ema)
        return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params), ema)

    return init


def abstract_state(init, mesh: Mesh):
    """Shapes, dtypes and shardings of the state that `init` makes, without making it."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        meshes.state_sharding(mesh, shapes),
    )


def create_state(init, abstract) -> TrainState:
    """The state of step 0, made inside jit, already sharded."""
    # It runs once: on CPU optimising it takes 10 s longer than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()


def with_weights(state: TrainState, variables: dict, model: Backbone) -> TrainState:
    """The state with other weights, of a model without `scan`; a moving average starts from them as well."""
    params = stack_blocks(variables["params"], model.stages) if model.scan else variables["params"]
    variables = {**variables, "params": params}

    def put(new: dict, old: dict) -> dict:
        # A copy: the train step donates the state, and on CPU an array may share the memory of numpy's.
        return jax.tree.map(lambda leaf, to: jnp.copy(jax.device_put(leaf, to.sharding)), new, old)

    ema = state.ema and put(variables, state.ema)
    variables = put(variables, state.variables)
    return state.replace(params=variables.pop("params"), model_state=variables, ema=ema)
