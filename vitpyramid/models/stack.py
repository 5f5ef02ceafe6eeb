"""A stage's equal blocks one after another: unrolled, recomputed in the backward pass, or as one compiled loop."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from vitpyramid.models.backbone import Stage
from vitpyramid.models.sharding import shard_batch


def apply_blocks(
    block: type[nn.Module], fields: dict, x: jax.Array, drop_paths: Sequence[float], name: str, remat: bool, scan: bool
) -> jax.Array:
    """Applies `len(drop_paths)` blocks to `x`, whose batch stays split over the mesh between them.

    Args:
      block: module class with a field `drop_path`, called with `x` alone.
      fields: its other fields, the same for every block.
      drop_paths: one rate a block.
      name: the blocks are called `{name}_{j}`.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: compile one block and loop over it, which needs less memory (benchmarks/README.md). Parameters are
        then stacked along a first axis under `name`; `stack_blocks` and `unstack_blocks` convert. Needs `remat`.

    Raises:
      ValueError: `scan` without `remat`, which would store more than it saves.
    """
    if not scan:
        block = nn.remat(block) if remat else block
        for j, rate in enumerate(drop_paths):
            x = shard_batch(block(**fields, drop_path=rate, name=f"{name}_{j}")(x))
        return x
    if not remat:
        raise ValueError("scan=True, remat=False: expected remat=True with scan")
    rates = jnp.asarray(drop_paths) if any(drop_paths) else None
    loop = nn.scan(
        nn.remat(_Step, prevent_cse=False),  # a loop's body is not merged with its recomputation anyway
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(drop_paths),
    )
    return loop(block, fields, name=name)(x, rates)[0]


class _Step(nn.Module):
    """One turn of the loop: a block with the rate of its turn."""

    block: type[nn.Module]
    fields: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, drop_path: jax.Array | None) -> tuple[jax.Array, None]:
        block = self.block(**self.fields, drop_path=0.0 if drop_path is None else drop_path)
        nn.share_scope(self, block)
        return shard_batch(block(x)), None


def is_stacked(path: str, stages: Sequence[Stage]) -> bool:
    """Whether the parameter at this path, parts joined by "/", is of all blocks of a stage, along its first axis."""
    # RegNetY's blocks have no number that could be left out: a stage's first is then `_stacked` itself.
    names = {_stacked(stage) for stage in stages} - {block for stage in stages for block in stage.blocks}
    return any(path.startswith(f"{name}/") for name in names)


def stack_blocks(params: Mapping, stages: Sequence[Stage]) -> dict:
    """Parameters as a model with `scan=True` has them, from those of one without.

    Raises:
      ValueError: blocks of one stage that differ in shape (`t2t_vit_dense`, RegNetY).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for stage in stages:
        blocks = [_take(flat, block) for block in stage.blocks]
        shapes = [jax.tree.map(jnp.shape, block) for block in blocks]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"the blocks of {_stacked(stage)} differ in shape and cannot be stacked")
        flat |= {f"{_stacked(stage)}/{key}": jnp.stack([block[key] for block in blocks]) for key in blocks[0]}
    return traverse_util.unflatten_dict(flat, sep="/")


def unstack_blocks(params: Mapping, stages: Sequence[Stage]) -> dict:
    """Parameters as a model without `scan` has them, from those of one with it; inverse of `stack_blocks`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for stage in stages:
        for key, value in _take(flat, _stacked(stage)).items():
            flat |= {f"{block}/{key}": value[j] for j, block in enumerate(stage.blocks)}
    return traverse_util.unflatten_dict(flat, sep="/")


def _stacked(stage: Stage) -> str:
    """Where a stage's blocks are once stacked: `block1` for `block1_0`, `block1_1`, ..., as `apply_blocks` has it."""
    return stage.blocks[0].removesuffix("_0")


def _take(flat: dict, module: str) -> dict:
    """Takes the parameters of a module out of `flat`; by path inside it."""
    return {path.removeprefix(f"{module}/"): flat.pop(path) for path in list(flat) if path.startswith(f"{module}/")}
