"""How long does a save stop training? The state of a config's network and optimizer, steps that only sleep, real saves.

    python benchmarks/save.py --config=configs/pvt.py:small --step=0.3 --saves=3

Prints for each save how long the loop stood still, how long writing went on behind it, and the median step meanwhile.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

sys.path.append(str(Path(__file__).parents[1]))
from vitpyramid.tasks import make_task
from vitpyramid.tools import config_args
from vitpyramid.train.program import build
from vitpyramid.train.sharding import make_mesh
from vitpyramid.train.state import create_state
from vitpyramid.weights import store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.3, help="seconds of a step")
    parser.add_argument("--saves", type=int, default=3)
    args, config = config_args.parse(parser, None)
    config.data.name = "synthetic"
    task = make_task(config)
    mesh = make_mesh(1)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        program = build(task, mesh)
        state = jax.block_until_ready(create_state(program.init, program.state))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"{config.model.name}: {size / 1e6:.0f} MB of state")
        checkpoints = store.open_checkpoints(Path(folder), keep=2, background=True)
        for number in range(args.saves):
            begin = time.perf_counter()
            store.save(checkpoints, number, state, {})
            stopped, steps = time.perf_counter() - begin, []
            while checkpoints.is_saving_in_progress():
                before = time.perf_counter()
                time.sleep(args.step)
                steps.append(time.perf_counter() - before)
            behind = time.perf_counter() - begin - stopped
            step = f", median step {statistics.median(steps):.3f} s" if steps else ""
            print(f"save {number + 1}: stopped for {stopped:.2f} s, written behind for {behind:.2f} s{step}")
        checkpoints.close()


if __name__ == "__main__":
    main()
