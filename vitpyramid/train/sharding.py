"""The device mesh and what lies where on it.

One mesh, axes `data` and `fsdp`; the batch is split over both, parameters over `fsdp`. `jax.jit` with these shardings
does what `pmap` did, and inserts the collectives itself.
"""

import collections
from collections.abc import Iterable, Iterator

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vitpyramid.models.sharding import BATCH_AXES
from vitpyramid.tasks.task import ConfigError

# Parameters smaller than this are copied to every device: gathering them costs more than they take.
MIN_SHARDED_SIZE = 2**14


def make_mesh(fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """The devices, by default all, as `(data, fsdp)`; `fsdp` stays within a slice of TPUs, `data` goes over slices.

    Raises:
      ConfigError: a slice has no multiple of `fsdp` devices.
    """
    devices = jax.devices() if devices is None else devices
    # Auto: jax.make_mesh defaults to Explicit axes, which ordinary Flax code does not run under.
    auto = (AxisType.Auto,) * 2
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh((len(devices) // fsdp, fsdp), BATCH_AXES, axis_types=auto, devices=devices)
    inside = len(devices) // slices
    if inside % fsdp:
        raise ConfigError(f"mesh.fsdp = {fsdp}: expected a divisor of the {inside} devices of a slice")
    arranged = mesh_utils.create_hybrid_device_mesh((inside // fsdp, fsdp), (slices, 1), devices)
    return Mesh(arranged, BATCH_AXES, axis_types=auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def state_sharding(mesh: Mesh, state):
    """Sharding of each array of a state, by its shape: the last of its longest axes that `fsdp` divides is split.

    Optimizer moments and averages have their parameter's shape, so they lie as it does.
    """

    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] == 1 or leaf.size < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, P(*(None,) * split, "fsdp"))

    return jax.tree.map(sharding, state)


def abstract_state(mesh: Mesh, state):
    """Shapes, dtypes and shardings of the arrays of a state."""
    shardings = state_sharding(mesh, state)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def to_devices(batches: Iterable[dict], sharding: NamedSharding, ahead: int = 2) -> Iterator[dict]:
    """Global device arrays of each process's host batches, transferred `ahead` of their use."""
    queue = collections.deque()
    for batch in batches:
        queue.append({k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()})
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
