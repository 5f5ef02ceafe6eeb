"""Weights from wherever they are, as a model and its variables."""

from pathlib import Path

import flax.linen as nn

from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.weights.adapt import adapt
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.dense_start import load_dense
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
) -> tuple[nn.Module, dict]:
    """A model and its weights.

    Args:
      path_or_dir: a folder that `vitpyramid.tools.convert` made; a work directory of `main.py`, of which the newest
        checkpoint is taken; a PyTorch or safetensors file; any of these at `gs://...`; `hf://owner/repo[/file]`;
        `https://...`.
      name: of the model, one of `list_models()`; None: as the folder says, or recognised by the file's keys and shapes.
      weights: "ema", "raw", or "auto": the moving average where a folder has one or a file has `state_dict_ema`.
      num_classes: None: as the weights have; another number than theirs: the head is initialised anew. A network for
        dense prediction is as its file has it.
      image_size: side of the square images whose grid the position tables get, resized; None: as the weights have.
      seed: of a new head.
      features_only: give the variables that `method="features"` reads, as a module that calls nothing else has them:
        without the last norm and the heads, which may then be missing from the weights.

    Returns:
      The model, with these `num_classes` and `image_size`, and `{"params": nested dict of float32 numpy arrays,
      ...}`, which `model.apply` takes.

    Raises:
      ValueError: nothing readable there, not the weights of a model, or of another one than `name`.
      OSError: no such file, or a source that cannot be reached.
    """
    # Here: whoever only makes models needs no libraries for downloads and checkpoints.
    from vitpyramid.weights.fetch import fetch
    from vitpyramid.weights.store import read_weights

    path, wanted = fetch(path_or_dir), (num_classes, image_size, seed, features_only)
    try:
        if path.is_dir():
            stored = read_weights(path, weights)
            if name not in (None, stored.network["name"]):
                raise ValueError(f"expected weights of {name}, these are of {stored.network['name']}")
            check_variables(stored.network, stored.variables)
            network, variables, *_ = adapt(stored.network, stored.variables, *wanted)
        else:
            content = read_torch_file(path)
            if name in DENSE:
                return load_dense(content, name, weights)
            network, variables, _ = import_weights(open_contents(content, weights), name, *wanted)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return create_model(**network), variables
