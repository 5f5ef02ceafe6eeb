"""Weights of one number of classes and image size, for another: new heads and resized position tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitpyramid.heads.registry import create_model
from vitpyramid.models.layers import resize_positions
from vitpyramid.weights.names import Path, class_paths, is_behind, model_shapes


class Adapted(NamedTuple):
    """Variables for another network of the same name.

    Attributes:
      network: as it was given, with the wanted numbers; for `create_model`.
      variables: nested dicts of numpy arrays, all that the network has.
      initialised: paths of what was not among the weights, or of another number of classes.
      resized: paths of position tables that were resized.
    """

    network: dict
    variables: dict
    initialised: list[Path]
    resized: list[Path]


def adapt(
    network: dict,
    variables: dict,
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    features_only: bool = False,
) -> Adapted:
    """Fits weights to heads of `num_classes` and to position tables for images of `image_size`.

    Args:
      network: `{"name", "num_classes", "image_size"}` of the weights, with heads on a backbone also "backbone".
      variables: nested dicts of numpy arrays, of the shapes that `network` has. What is missing is initialised.
      num_classes: None: as in `network`; another number: what has one is initialised.
      image_size: side of the square images whose grids the position tables get; None: as in `network`. Tables are
        resized as the network itself does it, class tokens' rows excepted.
      seed: of initialised parameters.
      features_only: leave out what stands behind the last stage.

    Raises:
      ValueError: unknown model.
    """
    numbers = {"num_classes": num_classes, "image_size": image_size}
    wanted = {**network, **{key: number for key, number in numbers.items() if number}}
    model = create_model(**wanted)
    shapes = model_shapes(**wanted)
    if features_only:
        shapes = {path: shape for path, shape in shapes.items() if not is_behind(model, path)}
    tables = zip(create_model(**network).position_tables, model.position_tables, strict=True)
    moved = {tuple(old.path.split("/")): (old, new) for old, new in tables if old.grid != new.grid}
    flat = traverse_util.flatten_dict(variables)
    if wanted["num_classes"] != network["num_classes"]:
        flat = {path: flat[path] for path in flat.keys() - class_paths(network)}
    fresh = [path for path in shapes if path not in flat]
    flat |= _initial(wanted, fresh, seed)
    resized = [path for path in moved if path not in fresh]
    for path in resized:
        old, new = moved[path]
        rows = flat[path].reshape(1, -1, shapes[path][-1])  # of a table, or of a map
        grid = resize_positions(rows[:, old.extra :], old.grid, new.grid, model.resize_method)
        flat[path] = np.concatenate([rows[:, : old.extra], grid], axis=1).reshape(shapes[path])
    return Adapted(wanted, traverse_util.unflatten_dict({path: flat[path] for path in shapes}), fresh, resized)


def _initial(network: dict, paths: list[Path], seed: int) -> dict[Path, np.ndarray]:
    """Fresh values at these paths, as a network starts with."""
    if not paths:
        return {}
    model = create_model(**network)

    def init() -> dict:
        variables = model.init(jax.random.key(seed), jnp.zeros((1, *model.height_width, 3)))
        flat = traverse_util.flatten_dict(variables)
        return {"/".join(path): flat[path] for path in paths}

    # In jit: what is not asked for is not computed.
    return {tuple(path.split("/")): np.asarray(value) for path, value in jax.jit(init)().items()}
