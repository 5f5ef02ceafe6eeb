"""A state saved by any number of processes, split in any way, is restored by any other: bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from soak import arrays, free_port
from vitpyramid.train.sharding import abstract_state, make_mesh
from vitpyramid.weights import store
from vitpyramid.weights.intact import steps

TESTS = Path(__file__).parent


def values():
    """A state: a matrix that `fsdp` splits, one that it does not, vectors, a counter, random bits in all of them."""
    rng = np.random.default_rng(5)
    shapes = {"wide": (64, 384), "odd": (333, 77), "bias": (384,), "statistics": (3,)}
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {**state, "ema": {"wide": -state["wide"]}, "step": np.int32(7)}


def carry_on(folder, fsdp, step):
    """Restores what was saved last, compares it, and saves it as `step`, which 0 begins."""
    mesh = make_mesh(fsdp)
    abstract = abstract_state(mesh, values())
    state = jax.tree.map(
        lambda value, to: jax.make_array_from_callback(value.shape, to.sharding, lambda index: value[index]),
        values(),
        abstract,
    )
    with store.open_checkpoints(Path(folder)) as manager:
        if step:
            restored = store.restore(manager, step - 1, abstract)
            for array, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
                assert array.sharding == expected.sharding
                for ours, theirs in zip(array.addressable_shards, expected.addressable_shards, strict=True):
                    np.testing.assert_array_equal(ours.data, theirs.data)
            state = restored
        store.save(manager, step, state, {})
        store.finish(manager)


def in_two_processes(*args):
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    program = (
        "import jax, sys; jax.distributed.initialize({!r}, 2, {}); import test_restore; test_restore.carry_on(*{!r})"
    )
    programs = [program.format(f"localhost:{port}", i, args) for i in range(2)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    runs = [subprocess.Popen([sys.executable, "-c", text], env=environment | {"PYTHONPATH": path}) for text in programs]
    assert [run.wait(timeout=600) for run in runs] == [0, 0]


def test_from_mesh_to_mesh_and_process_to_process(tmp_path):
    for step, fsdp in enumerate((8, 1, 4, 8)):
        carry_on(tmp_path, fsdp, step)
    in_two_processes(str(tmp_path), 8, 4)
    carry_on(tmp_path, 4, 5)
    in_two_processes(str(tmp_path), 2, 6)
    carry_on(tmp_path, 8, 7)
    assert steps(tmp_path / store.FOLDER) == list(range(7, -1, -1))
    flat = {"ema/wide": values()["ema"]["wide"], **{name: v for name, v in values().items() if name != "ema"}}
    saved = arrays(tmp_path, 7)
    assert saved.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(saved[name], value)
