"""What a network for dense prediction starts from: a whole file of one, or a classifier's weights for its backbone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.registry import create_model
from vitpyramid.weights import dense_names
from vitpyramid.weights.containers import unwrap


def load_dense(content: Any, name: str, weights: str = "auto") -> tuple[DenseNetwork, dict]:
    """The network called `name` and its variables, from what a checkpoint of mmdetection or detectron2 holds.

    Args:
      content: what `read_torch_file` returns.
      weights: as of `open_contents`.

    Raises:
      ValueError: no state dict in it, or none of this network (the message lists the keys).
    """
    container, found = unwrap(content, weights)
    state_dict = {key: array for key, array in found.items() if isinstance(array, np.ndarray)}
    try:
        variables = dense_names.torch_to_flax(name, state_dict)
    except ValueError as error:
        raise ValueError(f"{container}: {error}") from error
    variables = jax.tree.map(lambda array: np.asarray(array, np.float32), variables)
    shapes = {key: array.shape for key, array in state_dict.items()}
    return create_model(**dense_names.network_of(name, shapes)), variables


class Started(NamedTuple):
    """Variables of a network whose backbone was a classifier.

    Attributes:
      variables: all that the network has.
      unused: paths of the classifier that the backbone under a head has not: its head, a class token.
      initialised: paths of the network that no classifier has, or that have another shape there.
    """

    variables: dict
    unused: list[str]
    initialised: list[str]


def from_classifier(model: DenseNetwork, variables: Mapping, seed: int = 0) -> Started:
    """Variables of `model` with the backbone's from those of a classifier, the others as it starts with.

    Args:
      variables: `{"params": nested dict of arrays, ...}`, of the same family and size.
      seed: of initialised parameters.

    Raises:
      ValueError: nothing of the classifier fits.
    """

    def init() -> dict:
        return traverse_util.flatten_dict(model.init(jax.random.key(seed), jnp.zeros((1, 64, 64, 3))), sep="/")

    shapes = jax.eval_shape(init)
    given = {}
    for path, array in traverse_util.flatten_dict(variables, sep="/").items():
        collection, inside = path.split("/", 1)
        given[f"{collection}/backbone/{inside}"] = array
    taken = {path: given[path] for path in shapes if path in given and np.shape(given[path]) == shapes[path].shape}
    if not taken:
        raise ValueError(f"nothing of these weights fits the backbone, a {type(model.backbone).__name__}")
    initialised = [path for path in shapes if path not in taken]
    # In jit: what is not asked for is not computed.
    drawn = jax.jit(lambda: {path: value for path, value in init().items() if path in initialised})()
    flat = {path: taken.get(path, drawn.get(path)) for path in shapes}
    return Started(
        traverse_util.unflatten_dict(flat, sep="/"), [path for path in given if path not in taken], initialised
    )
