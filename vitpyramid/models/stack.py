"""A stage's equal blocks one after another: unrolled, recomputed in the backward pass, or as one compiled loop."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.layers import shard_batch

# What the families call a stage's blocks; `NAME_0`, `NAME_1`, ... are the blocks, `NAME` all of them stacked.
_BLOCKS = re.compile(r"(block\d|blocks|stage\d)(?:_(\d+))?")


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


def is_stacked(path: Sequence[str]) -> bool:
    """Whether the parameter at this path is of all blocks of a stage, along its first axis."""
    matches = (_BLOCKS.fullmatch(name) for name in path)
    return any(match and not match[2] for match in matches)


def stack_blocks(params: Mapping) -> dict:
    """Parameters as a model with `scan=True` has them, from those of one without.

    Raises:
      ValueError: blocks of one stage that differ in shape (`t2t_vit_dense`).
    """
    stages: dict[str, list] = {}
    stacked = {}
    for key in sorted(params, key=lambda key: [int(part) if part.isdigit() else part for part in key.split("_")]):
        match = _BLOCKS.fullmatch(key)
        if match and match[2]:
            stages.setdefault(match[1], []).append(params[key])
        else:
            stacked[key] = stack_blocks(params[key]) if isinstance(params[key], Mapping) else params[key]
    for name, blocks in stages.items():
        shapes = [jax.tree.map(jnp.shape, block) for block in blocks]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"the blocks of {name} differ in shape and cannot be stacked")
        stacked[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return stacked


def unstack_blocks(params: Mapping) -> dict:
    """Parameters as a model without `scan` has them, from those of one with it; inverse of `stack_blocks`."""
    unstacked = {}
    for key, value in params.items():
        match = _BLOCKS.fullmatch(key)
        if match and not match[2]:
            depth = len(jax.tree.leaves(value)[0])
            unstacked |= {f"{key}_{j}": jax.tree.map(lambda leaf, j=j: leaf[j], value) for j in range(depth)}
        else:
            unstacked[key] = unstack_blocks(value) if isinstance(value, Mapping) else value
    return unstacked
