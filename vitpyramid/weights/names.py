"""Variables in the names and layouts of the papers' PyTorch code, and back.

One rule, read here from Flax to PyTorch: path parts are joined by dots, a number at the end of a part becomes a part of
its own, and the last part is renamed.

    params       block1_0/attn/q/kernel  [in, out]        block1.0.attn.q.weight   [out, in]
    params       block1_0/attn/sr/kernel [h, w, in, out]  block1.0.attn.sr.weight  [out, in, h, w]
    params       block1_0/norm1/scale    [C]              block1.0.norm1.weight    [C]
    params       pos_embed1, cls_token                    the same
    batch_stats  stem/norm1/mean, var                     stem.norm1.running_mean, running_var
    constants    pos_embed (T2T-ViT)                      the same

The model itself says which paths and shapes there must be; both directions start from its paths. What is outside the
rule stands in the tables below.
"""

import functools
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.registry import create_model
from vitpyramid.models.backbone import Backbone, PositionTable
from vitpyramid.weights.pickles import brief

TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes of a Flax array in PyTorch's order, by last part of the path and number of dimensions: linear, convolutions of
# one and two dimensions, a position table that is a map.
TORCH_AXES = {
    ("kernel", 2): (1, 0),
    ("kernel", 3): (2, 1, 0),
    ("kernel", 4): (3, 2, 0, 1),
    ("pos_embed", 4): (0, 3, 1, 2),
}
# Modules whose PyTorch name has a number behind an underscore (ResT).
TORCH_MODULE = {f"patch_embedding_{i}": f"patch_embed_{i}" for i in (2, 3, 4)}
# First parts of names whose shapes follow from the number of classes.
HEADS = ("head", "head_dist")
# Counters that PyTorch's BatchNorm keeps and never uses: ignored on the way in, zero on the way out.
COUNTER = "num_batches_tracked"
LISTED = 10
# Of any network: position tables and heads are made of these numbers, which files and commands may claim.
LARGEST_SIDE = 4096
MOST_CLASSES = 100_000

Path = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]


def torch_to_flax(name: str, state_dict: Mapping) -> dict:
    """Variables of the model called `name` from a PyTorch state dict.

    Takes anything that has an array for every parameter: weights, their gradients, their moments.

    Args:
      name: one of `list_models()`.
      state_dict: arrays by PyTorch name, in PyTorch layout. Two numbers are taken from it and not from the variant: the
        number of classes (rows of `head.weight`), and the size of the square images whose grids the position tables
        have. The other shapes must agree with both.

    Returns:
      `{"params": nested dict of numpy arrays}` and the family's other collections: copies, each in the dtype it came
      in. They fit `create_model(name, num_classes=..., image_size=...)` with the numbers of the state dict.

    Raises:
      ValueError: unknown `name`; missing keys, unexpected keys, wrong shapes (the message lists them).
    """
    arrays = {key: np.asarray(value) for key, value in state_dict.items() if not key.endswith(f".{COUNTER}")}
    shapes = {key: array.shape for key, array in arrays.items()}
    expected = model_shapes(**network_of(name, shapes))
    _check(name, shapes, in_torch(expected))
    flat = {path: np.array(from_torch(path, arrays[torch_name(path)]), order="C") for path in expected}
    return traverse_util.unflatten_dict(flat)


def flax_to_torch(name: str, variables: Mapping) -> dict[str, np.ndarray]:
    """PyTorch state dict of the model called `name`; inverse of `torch_to_flax`, bit for bit.

    Args:
      name: one of `list_models()`.
      variables: `{"params": nested dict of arrays, ...}`, numpy or jax. Number of classes and image size are taken from
        it, as in `torch_to_flax`.

    Returns:
      Numpy arrays by PyTorch name, in PyTorch layout: copies, each in the dtype it came in.

    Raises:
      ValueError: unknown `name`; missing keys, unexpected keys, wrong shapes (the message lists them).
    """
    arrays = {path: np.asarray(value) for path, value in traverse_util.flatten_dict(variables).items()}
    network = network_of(name, in_torch({path: array.shape for path, array in arrays.items()}))
    check_variables(network, variables)
    state_dict = {torch_name(path): _to_torch(path, array) for path, array in arrays.items()}
    means = [key for key in state_dict if key.endswith(".running_mean")]
    return state_dict | {key.replace("running_mean", COUNTER): np.zeros((), np.int64) for key in means}


def torch_name(path: Path) -> str:
    *modules, leaf = path[1:] or path  # path[0] is the collection
    modules = [TORCH_MODULE.get(module) or re.sub(r"_(\d+)(?=$|_\d)", r".\1", module) for module in modules]
    return ".".join([*modules, TORCH_LEAF.get(leaf, leaf)])


def torch_axes(path: Path, ndim: int) -> tuple[int, ...]:
    """Axes of the Flax array at `path`, in PyTorch's order."""
    return TORCH_AXES.get((path[-1], ndim)) or tuple(range(ndim))


def in_torch(shapes: Mapping[Path, tuple[int, ...]]) -> Shapes:
    """Shapes by PyTorch name, in PyTorch's layout, of Flax ones by path."""
    return {
        torch_name(path): tuple(shape[axis] for axis in torch_axes(path, len(shape))) for path, shape in shapes.items()
    }


def flax_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the Flax array at `path` (joined by "/") of a PyTorch array."""
    return tuple(shape[axis] for axis in np.argsort(torch_axes(tuple(path.split("/")), len(shape))))


def _to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(torch_axes(path, array.ndim)), order="C")


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """A PyTorch array in the layout of the Flax array at `path`: a view."""
    return array.transpose(np.argsort(torch_axes(path, array.ndim)))


def network_of(name: str, torch_shapes: Shapes) -> dict:
    """`{"name", "num_classes", "image_size"}` of a state dict of the model called `name`; where the state dict has no
    head, no position tables or some that make no sense, the model's own numbers."""
    model = create_model(name)
    tables = {
        table.path: flax_shape(table.path, torch_shapes[key])
        for key, table in position_tables(model).items()
        if key in torch_shapes
    }
    return {
        "name": name,
        "num_classes": head_rows(torch_shapes) or model.num_classes,
        "image_size": model.native_side(tables) or model.image_size,
    }


def position_tables(model: Backbone) -> dict[str, PositionTable]:
    """The model's position tables by PyTorch name."""
    return {torch_name(tuple(table.path.split("/"))): table for table in model.position_tables}


def head_rows(torch_shapes: Shapes) -> int | None:
    """Number of classes of a state dict; None without a head."""
    heads = (shape for key, shape in torch_shapes.items() if re.fullmatch(r"head\.(\w+\.)?weight", key))
    return next((shape[0] for shape in heads if len(shape) == 2), None)


def model_shapes(
    name: str, num_classes: int, image_size: int | tuple[int, int], backbone: str = "", library: str | None = None
) -> dict[Path, tuple[int, ...]]:
    """Flax shapes by path of any of `list_models()`; `ValueError` beyond `LARGEST_SIDE` or `MOST_CLASSES`."""
    if num_classes > MOST_CLASSES or np.max(image_size) > LARGEST_SIDE:
        raise ValueError(
            f"{num_classes} classes, image size {image_size}: expected at most {MOST_CLASSES} and {LARGEST_SIDE}"
        )
    del library  # in whose names weights are makes no other shapes
    return variable_shapes(create_model(name, backbone, num_classes=num_classes, image_size=image_size))


@functools.lru_cache(maxsize=64)
def variable_shapes(model: Backbone | DenseNetwork) -> dict[Path, tuple[int, ...]]:
    """Shapes of a model's variables by path."""
    images = jax.ShapeDtypeStruct((1, *model.height_width, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def class_paths(network: Mapping) -> set[Path]:
    """Paths of what has another shape where `create_model(**network)` has another number of classes."""
    count = network["num_classes"]
    ours, others = (model_shapes(**{**network, "num_classes": number}) for number in (count, count - 1 or 2))
    return {path for path, shape in ours.items() if others[path] != shape}


def compare(shapes: Shapes, expected: Shapes) -> dict[str, list[str]]:
    """Keys that are "missing", "unexpected", or of a "wrong shape"; kinds without any are left out."""
    problems = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": [key for key in shapes if key not in expected],
        "wrong shape": [key for key, shape in expected.items() if shapes.get(key, shape) != shape],
    }
    return {kind: keys for kind, keys in problems.items() if keys}


def describe(problems: Mapping[str, list[str]], shapes: Shapes, expected: Shapes) -> str:
    """What `compare` found, a line a key, at most `LISTED` of each kind."""
    lines = []
    for kind, keys in problems.items():
        lines.append(f"{kind} ({len(keys)}):")
        for key in keys[:LISTED]:
            wrong = f" {shapes[key]}, expected {expected[key]}" if kind == "wrong shape" else ""
            lines.append(f"  {brief(key)}{wrong}")
        lines += ["  ..."] if len(keys) > LISTED else []
    return "\n".join(lines)


def is_behind(model: Backbone | DenseNetwork, path: Path) -> bool:
    """Whether what has this path in the variables stands behind the last stage of the model, or of its backbone."""
    inside = "/".join(path[1:])
    return any(inside == after or inside.startswith(f"{after}/") for after in model.after)


def check_variables(network: Mapping, variables: Mapping) -> None:
    """Raises `ValueError` (the message lists paths) unless these are variables of `create_model(**network)`."""
    shapes = {"/".join(path): np.shape(value) for path, value in traverse_util.flatten_dict(variables).items()}
    expected = {"/".join(path): shape for path, shape in model_shapes(**network).items()}
    _check(network["name"], shapes, expected)


def _check(name: str, shapes: Shapes, expected: Shapes) -> None:
    if problems := compare(shapes, expected):
        raise ValueError(f"these are not the parameters of {name}\n{describe(problems, shapes, expected)}")
