"""Weights in Orbax checkpoints: folders of converted weights, and what training leaves in its work directory.

Both have the checkpoint in `FOLDER/checkpoints/STEP`, with an item `state` (arrays) and an item `meta` (JSON), whose
`network` says what they are of. Converted weights are step 0.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from vitpyramid.models.registry import create_model
from vitpyramid.models.stack import unstack_blocks

FOLDER = "checkpoints"
CONVERTED = "conversion.json"  # beside it, in folders of converted weights


class Stored(NamedTuple):
    """Weights of a folder.

    Attributes:
      network: `{"name", "num_classes", "image_size"}`, for `create_model`.
      variables: nested dicts of float32 numpy arrays, blocks not stacked.
      weights: "raw" or "ema".
      step: steps that they were trained for; 0 for converted ones.
    """

    network: dict
    variables: dict
    weights: str
    step: int


def has_weights(folder: Path) -> bool:
    """Whether a folder has checkpoints that `read_weights` can read."""
    checkpoints = folder / FOLDER
    return checkpoints.is_dir() and any(child.name.isdecimal() for child in checkpoints.iterdir())


def write_weights(folder: Path, network: dict, variables: dict) -> None:
    """Writes variables as step 0. `network` is `{"name", "num_classes", "image_size"}`.

    Raises:
      FileExistsError: the folder has checkpoints.
    """
    if has_weights(folder):
        raise FileExistsError(f"{folder}: expected a folder without checkpoints; nothing is replaced")
    params = variables["params"]
    model_state = {name: collection for name, collection in variables.items() if name != "params"}
    state = {"step": np.int32(0), "params": params, "model_state": model_state, "ema": {}}
    meta = {"network": {**network, "scan": False}, "ema": False}
    with _manager(folder, create=True) as manager:
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        manager.save(0, args=items)


def read_weights(folder: Path, weights: str = "auto") -> Stored:
    """Reads the newest checkpoint of a folder, on the host, whatever mesh saved it.

    Args:
      weights: "raw", "ema" or "auto", which is the moving average where one was kept.

    Raises:
      ValueError: no complete checkpoint, or none with the weights asked for.
    """
    if not has_weights(folder):
        raise ValueError(f"{folder}: expected a folder with a complete checkpoint in {FOLDER}/")
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{folder / FOLDER}: expected a complete checkpoint, there is none")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if weights == "ema" and not meta["ema"]:
            raise ValueError(f"{folder}: expected a moving average of the weights, step {step} has none")
        average = meta["ema"] and weights != "raw"
        tree = manager.item_metadata(step)["state"].tree
        wanted = {"ema": tree["ema"]} if average else {"params": tree["params"], "model_state": tree["model_state"]}
        flat = traverse_util.flatten_dict(wanted)
        as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in flat}
        args = ocp.args.PyTreeRestore(
            traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(as_numpy), partial_restore=True
        )
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    variables = state["ema"] if average else {"params": state["params"], **state.get("model_state", {})}
    network = dict(meta["network"])
    if network.pop("scan"):
        variables = {**variables, "params": unstack_blocks(variables["params"], create_model(network["name"]).stages)}
    return Stored(network, variables, "ema" if average else "raw", step)


def _manager(folder: Path, create: bool = False) -> ocp.CheckpointManager:
    # Weights hardly compress, and compressing takes memory for another copy of them.
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_compression=False), "meta": ocp.JsonCheckpointHandler()}
    # Not in the background: that would copy all arrays first.
    options = ocp.CheckpointManagerOptions(create=create, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / FOLDER).absolute(), options=options, item_handlers=handlers)
