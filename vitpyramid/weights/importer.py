"""From a state dict in the papers' names to the variables of a model, with every key accounted for."""

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.registry import create_model
from vitpyramid.models.backbone import Backbone
from vitpyramid.models.registry import VARIANTS
from vitpyramid.weights import dense_names, names
from vitpyramid.weights.adapt import adapt
from vitpyramid.weights.containers import Contents
from vitpyramid.weights.pickles import DTYPES, brief

PROBLEMS = ("missing", "unexpected", "wrong shape", "nonfinite")
FLOATS = tuple(DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64"))


class Converted(NamedTuple):
    """A model's variables from PyTorch weights.

    Attributes:
      network: `{"name", "num_classes", "image_size"}`, for `create_model`; with heads on a backbone also "backbone".
      variables: nested dicts of float32 numpy arrays.
      notes: keys by what happened to them, for those that were not simply taken: "ignored" (counters, other parts of a
        detector), "missing", "unexpected", "wrong shape" (all allowed by the caller), "initialised", "resized".
    """

    network: dict
    variables: dict
    notes: dict[str, list[str]]


def import_weights(
    contents: Contents,
    name: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    features_only: bool = False,
    allow: Collection[str] = (),
    backbone: str = "",
) -> Converted:
    """Turns a state dict into variables.

    Args:
      contents: what `open_contents` returns, given the same name.
      name: of the model; None: of a backbone, recognised by the keys and shapes.
      num_classes: None: as in the file; another number than the file's: the head is initialised anew.
      image_size: side of the square images whose grids the position tables get, resized; None: as in the file.
      seed: of initialised parameters.
      features_only: leave out what stands behind the last stage, which may be missing or of another shape.
      allow: kinds of `PROBLEMS` that are no error. Parameters missing or of another shape are then initialised.
      backbone: name of what the heads of a network for dense prediction stand on; "": their own.

    Raises:
      ValueError: unknown or unrecognised model, problems that are not allowed (the message lists the keys), or weights
        that are not of floating point.
    """
    shapes = {key: array.shape for key, array in contents.state_dict.items()}
    name = name or recognise(shapes)
    network = dense_names.network_of(name, shapes, backbone)
    model = create_model(**network)
    name_of = functools.partial(dense_names.torch_name, model)
    rows = _absent_rows(model, shapes)
    state_dict = dict(contents.state_dict)
    for key, n in rows.items():
        state_dict[key] = np.pad(state_dict[key], ((0, 0), (n, 0), (0, 0)))
    shapes = {key: array.shape for key, array in state_dict.items()}
    native = names.model_shapes(**network)
    in_files = [path for path in native if path != dense_names.NORMALISER]
    expected = {name_of(path): dense_names.torch_shape(path, native[path]) for path in in_files}
    problems = names.compare(shapes, expected)
    new_head = num_classes not in (None, dense_names.classes_in(model, shapes))
    replaced = {name_of(path) for path in names.class_paths(network)} if new_head else set()
    if features_only:
        replaced |= {name_of(path) for path in native if names.is_behind(model, path)}
    problems = {kind: [key for key in keys if key not in replaced] for kind, keys in problems.items()}
    # Copies: the file's own arrays, which may be the file mapped, can be let go of.
    flat = {}
    for path, key in zip(in_files, expected, strict=True):
        if key in replaced or shapes.get(key) != expected[key]:
            continue
        if state_dict[key].dtype not in FLOATS:
            raise ValueError(f"{key} is of {state_dict[key].dtype}, expected one of {', '.join(map(str, FLOATS))}")
        with np.errstate(over="ignore"):
            flat[path] = dense_names.from_torch(path, np.asarray(state_dict[key], np.float32), native[path])
        if not np.isfinite(flat[path]).all():
            problems.setdefault("nonfinite", []).append(key)
    refused = {kind: keys for kind, keys in problems.items() if keys and kind not in allow}
    if refused:
        raise ValueError(
            f"these are not the parameters of {name}\n{names.describe(refused, shapes, expected)}\n"
            f"--allow={','.join(kind.replace(' ', '_') for kind in refused)} goes on all the same."
        )
    if dense_names.NORMALISER in native:
        flat[dense_names.NORMALISER] = dense_names.FIRST_NORMALISER
    adapted = adapt(network, traverse_util.unflatten_dict(flat), num_classes, image_size, seed, features_only)
    zeros = [f"{key}[:, {row}]" for key, n in rows.items() for row in range(n)]
    notes = {
        "ignored": contents.ignored,
        **problems,
        "initialised": sorted(map(name_of, adapted.initialised)) + zeros,
        "resized": list(map(name_of, adapted.resized)),
    }
    return Converted(adapted.network, adapted.variables, {kind: keys for kind, keys in notes.items() if keys})


def recognise(shapes: names.Shapes) -> str:
    """Name of the model whose parameters have these PyTorch names and shapes.

    Raises:
      ValueError: no family has such keys, or several networks fit equally well (the message lists them).
    """
    distance = {}
    for name, variant in VARIANTS.items():
        if names.torch_name(("params", *variant.model.signature.split("/"))) not in shapes:
            continue
        expected = names.in_torch(names.model_shapes(**names.network_of(name, shapes)))
        problems = names.compare(shapes, expected)
        headless = [key for key in problems.pop("missing", ()) if key.split(".")[0] not in names.HEADS]
        distance[name] = len(headless) + sum(map(len, problems.values()))
    nearest = [name for name in distance if distance[name] == min(distance.values())]
    if not nearest:
        listed = ", ".join(map(brief, list(shapes)[: names.LISTED]))
        raise ValueError(f"no model is known by these keys: {listed} ...; --model names one")
    if len(nearest) > 1:
        raise ValueError(f"these keys and shapes fit {', '.join(nearest)} equally well: --model says which it is")
    return nearest[0]


def _absent_rows(model: Backbone | DenseNetwork, shapes: names.Shapes) -> dict[str, int]:
    """How many rows position tables lack, by key: those of class tokens, which detectors drop with the tokens."""
    tables = () if "cls_token" in shapes else model.position_tables
    by_key = {dense_names.torch_name(model, tuple(table.path.split("/"))): table for table in tables}
    return {
        key: table.extra
        for key, table in by_key.items()
        if table.extra and shapes.get(key, ())[1:-1] == (math.prod(table.grid),)
    }
