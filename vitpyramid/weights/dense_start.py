"""What a network for dense prediction starts from: a classifier's weights for its backbone."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitpyramid.heads.network import DenseNetwork


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
