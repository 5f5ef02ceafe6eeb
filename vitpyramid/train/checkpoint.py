"""Whether a run may go on from a checkpoint, or be evaluated with it. The format is in `weights.store`.

The data's position needs no file: batches are a function of the seed and the step.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vitpyramid.tasks.task import ConfigError, Task
from vitpyramid.train.config import differences
from vitpyramid.train.state import TrainState
from vitpyramid.weights import store


def save(manager: ocp.CheckpointManager, state: TrainState, task: Task) -> None:
    """Starts saving the state of this step; the files are written while training goes on."""
    meta = {
        "network": _network(task),
        "ema": bool(state.ema),
        "config": task.config.to_dict(),
        "num_examples": task.num_examples(),
        "about": task.about(),
    }
    store.save(manager, int(state.step), state, meta)


def check_is_no_conversion(workdir: Path) -> None:
    """Raises `ConfigError` if `workdir` holds converted weights, which a run must not replace."""
    if (workdir / store.CONVERTED).exists():
        raise ConfigError(f"--workdir={workdir}: expected a folder for a run, this one holds converted weights")


def check_continues(manager: ocp.CheckpointManager, step: int, task: Task) -> None:
    """Raises `ConfigError` if going on from a checkpoint with this task would not continue the run that saved it."""
    meta = store.read_meta(manager, step)
    changed = differences(task.config, meta["config"])
    if meta["num_examples"] != task.num_examples():
        changed.append(f"examples in data.train_split: {meta['num_examples']} -> {task.num_examples()}")
    if changed:
        raise ConfigError(
            f"{manager.directory}/{step} was saved by a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nUse another --workdir, or pass --allow_config_change to go on from it all the same."
        )


def check_fits(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    """Raises `ConfigError` if a checkpoint has other arrays than `state`, which is abstract."""
    ours, saved = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (state, manager.item_metadata(step)["state"].tree))
    )
    if differing := [name for name in sorted(ours | saved) if ours.get(name) != saved.get(name)]:
        raise ConfigError(
            f"{manager.directory}/{step} has other arrays than this config's network and optimizer: {len(differing)} "
            f"differ, such as {', '.join(differing[:3])}. --config.init takes the weights alone"
        )


def check_evaluates(manager: ocp.CheckpointManager, step: int, task: Task) -> bool:
    """Raises `ConfigError` if this task is not of the network that was saved. Returns whether it has an average."""
    meta = store.read_meta(manager, step)
    saved, ours = meta["network"], _network(task)
    changed = [
        f"{key}: {saved[name]!r} -> {ours[name]!r}"
        for key, name in zip(task.network, ours, strict=True)
        if saved[name] != ours[name]
    ]
    if changed:
        raise ConfigError(f"{manager.directory}/{step} was saved with another config:\n  " + "\n  ".join(changed))
    return meta["ema"]


def _network(task: Task) -> dict:
    """By the last part of the config keys, which is what `create_model` calls them."""
    return {key.rpartition(".")[2]: value for key, value in task.network.items()}
