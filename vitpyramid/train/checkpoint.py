"""Checkpoints: the state, and beside it what is needed to know that a run goes on where it stopped.

Each lies in `WORKDIR/checkpoints/STEP`, written under a temporary name and renamed when complete, so a half-written one
is never picked up. The data's position needs no file: batches are a function of the seed and the step.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from vitpyramid.train.config import ConfigError, differences
from vitpyramid.train.state import TrainState
from vitpyramid.weights.store import CONVERTED, FOLDER


def open_checkpoints(workdir: Path, keep: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a work directory; the newest `keep` are kept as new ones are saved."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        create=not read_only,
        cleanup_tmp_directories=not read_only,
    )
    # Orbax splits every copied array among the devices that hold it, which compiles one program per shape; below this
    # size the compilations cost far more than the writing.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: TrainState, config: ConfigDict, num_examples: int) -> None:
    """Starts saving the state of this step; the files are written while training goes on."""
    meta = {
        "network": {**network(config), "scan": config.model.scan},
        "ema": config.ema.decay > 0,
        "config": config.to_dict(),
        "num_examples": num_examples,
    }
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(int(state.step), args=items)


def restore(manager: ocp.CheckpointManager, step: int, abstract):
    """What was saved at `step`, with the shapes, dtypes and shardings of `abstract`, whatever mesh saved it.

    `abstract` is a whole `TrainState`, or a dict of some of its fields.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    state = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=isinstance(abstract, dict))
    return manager.restore(step, args=ocp.args.Composite(state=state))["state"]


def network(config: ConfigDict) -> dict:
    """What `create_model` needs to know to make the network of a config again."""
    model = config.model
    return {"name": model.name, "num_classes": model.num_classes, "image_size": config.data.image_size}


def check_is_no_conversion(workdir: Path) -> None:
    """Raises `ConfigError` if `workdir` holds converted weights, which a run must not replace."""
    if (workdir / CONVERTED).exists():
        raise ConfigError(f"--workdir={workdir}: expected a folder for a run, this one holds converted weights")


def check_continues(manager: ocp.CheckpointManager, step: int, config: ConfigDict, num_examples: int) -> None:
    """Raises `ConfigError` if going on from a checkpoint with this config would not continue the run that saved it."""
    meta = _read_meta(manager, step)
    changed = differences(config, meta["config"])
    if meta["num_examples"] != num_examples:
        changed.append(f"examples in data.train_split: {meta['num_examples']} -> {num_examples}")
    if changed:
        raise ConfigError(
            f"{manager.directory}/{step} was saved by a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nUse another --workdir, or pass --allow_config_change to go on from it all the same."
        )


def check_evaluates(manager: ocp.CheckpointManager, step: int, config: ConfigDict) -> bool:
    """Raises `ConfigError` if this config is not of the network that was saved. Returns whether it has an average."""
    meta = _read_meta(manager, step)
    ours = {**network(config), "scan": config.model.scan}
    keys = {"name": "model.name", "num_classes": "model.num_classes", "image_size": "data.image_size"}
    changed = [
        f"{keys.get(key, f'model.{key}')}: {meta['network'][key]!r} -> {ours[key]!r}"
        for key in ours
        if ours[key] != meta["network"][key]
    ]
    if changed:
        raise ConfigError(f"{manager.directory}/{step} was saved with another config:\n  " + "\n  ".join(changed))
    return meta["ema"]


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
