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
    axes = tuple(axis for axis in BATCH_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def by_device(function: Callable, axis: int) -> Callable:
    """A function of arrays, split over the mesh's batch axes along `axis`, that each device calls with its own part.

    For loops that run until all rows are done: as one program over the mesh every round of them would wait for all
    devices. No mesh, or rows that it does not divide: no effect.
    """

    def call(*arrays: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
        if not axes or any(x.shape[axis] % math.prod(mesh.shape[name] for name in axes) for x in arrays):
            return function(*arrays)
        spec = PartitionSpec(*(None,) * axis, axes)
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return call
