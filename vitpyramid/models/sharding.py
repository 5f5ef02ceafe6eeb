"""How activations lie on a mesh of devices."""

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
