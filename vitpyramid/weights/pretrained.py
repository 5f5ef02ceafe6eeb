"""Weights from wherever they are, as a model and its variables."""

from pathlib import Path

import flax.linen as nn

from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.weights.adapt import adapt
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.importer import import_weights
from vitpyramid.weights.names import check_variables
from vitpyramid.weights.reader import read_torch_file


def load_pretrained(
    path_or_dir: str | Path,
    name: str | None = None,
    weights: str = "auto",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    features_only: bool = False,
    backbone: str | None = None,
) -> tuple[nn.Module, dict]:
    """A model and its weights.

    Args:
      path_or_dir: a folder that `vitpyramid.tools.convert` made; a work directory of `main.py`, of which the newest
        checkpoint is taken; a PyTorch or safetensors file; any of these at `gs://...`; `hf://owner/repo[/file]`;
        `https://...`.
      name: of the model, one of `list_models()`; None: as the folder says, or recognised by the file's keys and shapes,
        which of a detector's file finds the backbone.
      weights: "ema", "raw", or "auto": the moving average where a folder has one or a file has `state_dict_ema`.
      num_classes: None: as the weights have; another number than theirs: what has one is initialised anew.
      image_size: side of the square images whose grid the position tables get, resized; None: as the weights have.
      seed: of a new head.
      features_only: give the variables that `method="features"` reads, as a module that calls nothing else has them:
        without the last norm and the heads, which may then be missing from the weights.
      backbone: name of what the heads of a network for dense prediction stand on; None: as the folder says, or their
        own.

    Returns:
      The model, with these `num_classes` and `image_size`, and `{"params": nested dict of float32 numpy arrays,
      ...}`, which `model.apply` takes.

    Raises:
      ValueError: nothing readable there, not the weights of a model, or of another one than `name`.
      OSError: no such file, or a source that cannot be reached.
    """
    wanted = num_classes, image_size, seed, features_only
    network, variables = read_pretrained(path_or_dir, name, weights, backbone, *wanted)
    return create_model(**network), variables


def read_pretrained(
    path_or_dir: str | Path, name: str | None = None, weights: str = "auto", backbone: str | None = None, *wanted
) -> tuple[dict, dict]:
    """As `load_pretrained`, but gives what `create_model` makes the model of: `{"name", "num_classes", "image_size"}`,
    with heads on a backbone also "backbone". `wanted` are further arguments of `adapt`."""
    # Here: whoever only makes models needs no libraries for downloads and checkpoints.
    from vitpyramid.weights.fetch import fetch
    from vitpyramid.weights.store import read_weights

    path = fetch(path_or_dir)
    try:
        if path.is_dir():
            stored = read_weights(path, weights)
            if name not in (None, stored.network["name"]):
                raise ValueError(f"expected weights of {name}, these are of {stored.network['name']}")
            if backbone and backbone != (below := backbone_of(stored.network)):
                raise ValueError(f"expected heads on {backbone}, these stand on {below}")
            check_variables(stored.network, stored.variables)
            network, variables, *_ = adapt(stored.network, stored.variables, *wanted)
        else:
            contents = open_contents(read_torch_file(path), weights, name)
            network, variables, _ = import_weights(contents, name, *wanted, backbone=backbone or "")
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return network, variables


def backbone_of(network: dict) -> str | None:
    """Name of what the heads of a network stand on, from what `create_model` makes it of; None if it has no such."""
    variant = DENSE.get(network["name"])
    return variant and (network["backbone"] or variant.backbone)
