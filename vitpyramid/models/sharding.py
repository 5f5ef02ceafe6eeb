"""How activations lie on a mesh of devices."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

# Mesh axes over which the batch is split. Parameters may be split over some of them as well.
BATCH_AXES = ("data", "fsdp")


def shard_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis of `x` split over the mesh's batch axes and the others whole; no mesh, no effect.

    Without this at block boundaries the compiler shards activations over features when parameters are sharded,
    which costs a gather of the whole batch in every block.
    """
    axes = _batch_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def whole(x: jax.Array) -> jax.Array:
    """Keeps `x` whole on every device of the mesh; no mesh, no effect."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _batch_axes() else x


def map_rows(function: Callable, *rows):
    """`jax.vmap(function)(*rows)`, each device of the mesh by itself for its own rows.

    For sorts and for loops whose turns depend on the data: left to the compiler, devices gather the whole batch for the
    former and ask one another in every turn of the latter whether it was the last. What `function` reads beside its
    arguments it must make itself.
    """
    return on_each_device(jax.vmap(function), *rows)


def on_each_device(function: Callable, *rows):
    """`function(*rows)`, each device of the mesh by itself for its own rows; where they cannot be split, for all."""
    spec, devices = PartitionSpec(_batch_axes()), batch_devices()
    if devices > 1 and len(jax.tree.leaves(rows)[0]) % devices == 0:
        function = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
    return function(*rows)


def batch_devices() -> int:
    """Number of devices of the mesh that is set over which the batch is split."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _batch_axes())


def _batch_axes() -> tuple[str, ...]:
    """Those of the mesh that is set."""
    return tuple(axis for axis in BATCH_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
