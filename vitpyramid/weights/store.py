"""The format of a checkpoint: what training leaves in its work directory, and folders of converted weights.

Both have checkpoints in `FOLDER/checkpoints/STEP`, written under a temporary name and renamed when complete, or in a
bucket marked when complete, so that a half-written one is never picked up. Each has an item `state`, arrays (`step`,
`params`, `model_state`, `opt_state`, `ema`), and an item `meta`, JSON:

    network       {"name", "num_classes", "image_size", "scan"}: what `create_model` needs; of a network for dense
                  prediction also "backbone", "" for its own
    ema           whether `state` has a moving average of the weights
    config        of the run that saved it
    num_examples  of its training split
    about         what else its task says: {"classes": their names, "category_ids": in results}

Converted weights are step 0, with `network` and `ema` alone.
"""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from vitpyramid.files import in_bucket
from vitpyramid.heads.registry import create_model
from vitpyramid.models.stack import unstack_blocks
from vitpyramid.weights import intact

FOLDER = "checkpoints"
CONVERTED = "conversion.json"  # beside it, in folders of converted weights


class Stored(NamedTuple):
    """Weights of a folder.

    Attributes:
      network: `{"name", "num_classes", "image_size"}`, for `create_model`; with heads on a backbone also "backbone".
      variables: nested dicts of float32 numpy arrays, blocks not stacked.
      weights: "raw" or "ema".
      step: steps that they were trained for; 0 for converted ones.
    """

    network: dict
    variables: dict
    weights: str
    step: int


def open_checkpoints(
    folder: Path, keep: int | None = None, read_only: bool = False, background: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of a folder.

    Args:
      keep: so many of the newest are kept as new ones are saved; None: all.
      read_only: nothing is made or cleaned up.
      background: files are written while the program goes on, from a copy of the arrays.
    """
    # epath's `absolute` puts the current folder before a bucket's name.
    checkpoints = folder / FOLDER if in_bucket(folder) else (folder / FOLDER).absolute()
    # Orbax calls this between the writing of the last file and the final name.
    finished = ocp.AsyncOptions(post_finalization_callback=functools.partial(intact.seal_written, checkpoints))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep) if keep else None,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=background,
        async_options=finished if background and jax.process_index() == 0 else None,
    )
    # Orbax splits every copied array among the devices that hold it, which compiles one program per shape; below this
    # size the compilations cost far more than the writing.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, types.NumpyHandler()), (np.number, types.ScalarHandler())
    )
    # Weights hardly compress, and compressing takes memory for another copy of them.
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(checkpoints, options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict) -> None:
    """Saves a step; with `background`, begins to.

    Raises:
      OSError: it, or the one before in the background, cannot be written.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if not in_bucket(manager.directory) and needed > (free := shutil.disk_usage(manager.directory).free):
        space = f"{needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise OSError(f"{manager.directory}: expected space for the checkpoint of step {step}, {space}")
    with _saving(manager):
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)))


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits for what is saved in the background. Raises as `save`."""
    with _saving(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Orbax's errors are ValueErrors of many lines, whatever went wrong."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{manager.directory}: cannot save: {str(error).splitlines()[0]}") from error


def restore(manager: ocp.CheckpointManager, step: int, abstract):
    """What was saved at `step`, with the shapes, dtypes and shardings of `abstract`, whatever mesh saved it.

    `abstract` is all that was saved, or a dict of some of its entries.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    state = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=isinstance(abstract, dict))
    return manager.restore(step, args=ocp.args.Composite(state=state))["state"]


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    """What stands beside the arrays of `step`."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def newest_meta(folder: Path) -> dict:
    """What stands beside the arrays of the newest checkpoint of a folder; the arrays are not looked at.

    Raises `ValueError` if there is no checkpoint.
    """
    found = intact.steps(folder / FOLDER)
    if not found:
        raise ValueError(f"{folder}: expected a folder with a complete checkpoint in {FOLDER}/")
    with open_checkpoints(folder, read_only=True) as manager:
        return read_meta(manager, found[0])


def has_weights(folder: Path) -> bool:
    """Whether a folder has checkpoints that `read_weights` can read."""
    return bool(intact.steps(folder / FOLDER))


def write_weights(folder: Path, network: dict, variables: dict) -> None:
    """Writes variables as step 0; `network` is as in `Stored`.

    Raises:
      FileExistsError: the folder has checkpoints.
    """
    if has_weights(folder):
        raise FileExistsError(f"{folder}: expected a folder without checkpoints; nothing is replaced")
    params = variables["params"]
    model_state = {name: collection for name, collection in variables.items() if name != "params"}
    state = {"step": np.int32(0), "params": params, "model_state": model_state, "ema": {}}
    with open_checkpoints(folder) as manager:
        save(manager, 0, state, {"network": {**network, "scan": False}, "ema": False})
    intact.seal(folder / FOLDER / "0")


def read_weights(folder: Path, weights: str = "auto") -> Stored:
    """Reads the newest intact checkpoint of a folder, on the host, whatever mesh saved it.

    Args:
      weights: "raw", "ema" or "auto", which is the moving average where one was kept.

    Raises:
      ValueError: no checkpoint, or none with the weights asked for.
      OSError: no checkpoint is intact.
    """
    step = intact.newest_intact(folder / FOLDER)
    if step is None:
        raise ValueError(f"{folder}: expected a folder with a complete checkpoint in {FOLDER}/")
    with open_checkpoints(folder, read_only=True) as manager:
        meta = read_meta(manager, step)
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
        stages = create_model(**network).stages
        variables = {**variables, "params": unstack_blocks(variables["params"], stages)}
    return Stored(network, variables, "ema" if average else "raw", step)
