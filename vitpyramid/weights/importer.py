"""From a state dict in the papers' names to the variables of a model, with every key accounted for."""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitpyramid.models.layers import resize_positions
from vitpyramid.models.registry import create_model, list_models
from vitpyramid.weights import names
from vitpyramid.weights.containers import Contents

# A key that only this family has, and the first part of the family's model names.
SIGNATURES = {
    "pos_embed1": "pvt_",
    "patch_embed.conv.weight": "pit_",
    "tokens_to_token.project.weight": "t2t_",
    "patch_embed_2.conv.weight": "rest_",
    "patch_embed.proj.weight": "deit_",
    "s1.b1.conv1.conv.weight": "regnety_",
}
HEADS = ("head", "head_dist")
PROBLEMS = ("missing", "unexpected", "wrong shape")


class Converted(NamedTuple):
    """A model's variables from PyTorch weights.

    Attributes:
      name, num_classes, image_size: of the model, for `create_model`.
      variables: nested dicts of float32 numpy arrays.
      notes: keys by what happened to them, for those that were not simply taken: "ignored" (counters, other parts of a
        detector), "missing", "unexpected", "wrong shape" (all allowed by the caller), "initialised", "resized".
    """

    name: str
    num_classes: int
    image_size: int
    variables: dict
    notes: dict[str, list[str]]


def import_weights(
    contents: Contents,
    name: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    allow: Collection[str] = (),
    seed: int = 0,
) -> Converted:
    """Turns a state dict into variables.

    Args:
      contents: what `open_contents` returns.
      name: of the model; None: recognised by the keys and shapes.
      num_classes: None: as in the file; another number than the file's: the head is initialised anew.
      image_size: side of the square images whose grid the position tables get; None: as in the file. Tables are
        resized bilinearly (PVT, as its code does) or bicubically (the others), class tokens' rows excepted.
      allow: kinds of `PROBLEMS` that are no error. Parameters missing or of another shape are then initialised.
      seed: of initialised parameters.

    Raises:
      ValueError: unknown or unrecognised model, or problems that are not allowed (the message lists the keys).
    """
    state_dict = dict(contents.state_dict)
    filled = "cls_token" not in state_dict and _add_class_row(state_dict)
    shapes = {key: array.shape for key, array in state_dict.items()}
    name = name or recognise(shapes)
    native = names.native_shapes(name, shapes)
    expected = names.in_torch(native)
    problems = names.compare(shapes, expected)

    model = create_model(name)
    head_rows = names.head_rows(shapes)
    new_head = [key for key in expected if key.split(".")[0] in HEADS and num_classes not in (None, head_rows)]
    problems = {kind: [key for key in keys if key not in new_head] for kind, keys in problems.items()}
    num_classes = num_classes or head_rows or model.num_classes
    refused = {kind: keys for kind, keys in problems.items() if keys and kind not in allow}
    if refused:
        raise ValueError(
            f"these are not the parameters of {name}\n{names.describe(refused, shapes, expected)}\n"
            f"--allow={','.join(kind.replace(' ', '_') for kind in refused)} goes on all the same."
        )

    size = image_size or names.native_image_size(name, shapes) or model.image_size
    target = names.model_shapes(name, num_classes, size)
    anew = {*new_head, *problems.get("missing", ()), *problems.get("wrong shape", ())}
    flat, fresh, resized = {}, [], []
    for path, key in zip(native, expected, strict=True):
        if key in anew:
            fresh.append(path)
            continue
        # A copy: the file's own arrays, which may be the file mapped, can be let go of.
        array = np.array(names.from_torch(path, state_dict[key]), np.float32, order="C")
        if array.shape != target[path]:
            array = _resize(array, target[path], "bilinear" if name.startswith("pvt_") else "bicubic")
            resized.append(key)
        flat[path] = array
    flat |= _initial(name, num_classes, size, fresh, seed)
    notes = {
        "ignored": contents.ignored,
        **problems,
        "initialised": sorted(anew) + ["pos_embed4[:, 0]"] * filled,
        "resized": resized,
    }
    variables = traverse_util.unflatten_dict({path: flat[path] for path in target})
    return Converted(name, num_classes, size, variables, {kind: keys for kind, keys in notes.items() if keys})


def recognise(shapes: names.Shapes) -> str:
    """Name of the model whose parameters have these PyTorch names and shapes.

    Raises:
      ValueError: no family has such keys, or several networks fit equally well (the message lists them).
    """
    prefix = next((prefix for key, prefix in SIGNATURES.items() if key in shapes), None)
    if prefix is None:
        raise ValueError(f"no model is known by these keys: {', '.join(list(shapes)[:10])} ...; --model names one")
    distance = {}
    for name in list_models(prefix):
        expected = names.in_torch(names.native_shapes(name, shapes))
        distance[name] = sum(len(keys) for keys in names.compare(shapes, expected).values())
    nearest = [name for name in distance if distance[name] == min(distance.values())]
    if len(nearest) > 1:
        raise ValueError(f"these keys and shapes fit {', '.join(nearest)} equally well: --model says which it is")
    return nearest[0]


def _add_class_row(state_dict: dict[str, np.ndarray]) -> bool:
    """Gives PVT's last position table the class token's row, which detectors drop: zeros. Says whether it did."""
    table = state_dict.get("pos_embed4", np.empty(0))
    if table.ndim != 3 or _extra_tokens(table.shape):
        return False
    state_dict["pos_embed4"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    return True


def _extra_tokens(table: tuple[int, ...]) -> int:
    """Rows of a position table `[1, extra + side * side, C]` in front of those of the grid."""
    return table[1] - math.isqrt(table[1]) ** 2


def _resize(table: np.ndarray, shape: tuple[int, ...], method: str) -> np.ndarray:
    """A position table, `[1, side, side, C]` or `[1, extra + side * side, C]`, of another side."""
    if table.ndim == 4:
        rows = table.reshape(1, -1, table.shape[-1])
        return np.asarray(resize_positions(rows, table.shape[1:3], shape[1:3], method)).reshape(shape)
    extra = _extra_tokens(table.shape)
    grid, new_grid = (2 * (math.isqrt(rows),) for rows in (table.shape[1], shape[1]))
    return np.concatenate([table[:, :extra], resize_positions(table[:, extra:], grid, new_grid, method)], axis=1)


def _initial(name: str, num_classes: int, image_size: int, paths: list[names.Path], seed: int) -> dict:
    """Fresh values at these paths, as a model starts with."""
    if not paths:
        return {}
    model = create_model(name, num_classes=num_classes, image_size=image_size)

    def init() -> dict:
        variables = model.init(jax.random.key(seed), jnp.zeros((1, image_size, image_size, 3)))
        flat = traverse_util.flatten_dict(variables)
        return {"/".join(path): flat[path] for path in paths}

    # In jit: what is not asked for is not computed.
    return {tuple(path.split("/")): np.asarray(value) for path, value in jax.jit(init)().items()}
