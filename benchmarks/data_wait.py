"""Does a step ever wait for its batch? A step that only sleeps, fed as the training loop feeds its steps.

    python benchmarks/data_wait.py --config=configs/pvt.py:tiny --batch=64 --steps=30

Prints how long making a batch takes by itself, and for steps of 0.5 to 3 times that, what part of the time was waiting.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from vitpyramid import data
from vitpyramid.tools import config_args
from vitpyramid.train.sharding import batch_sharding, make_mesh, to_devices


def waiting(config, step_seconds: float, steps: int) -> tuple[float, float]:
    """Seconds in all and seconds of waiting, of `steps` steps after three that fill the buffers."""
    source = data.open_source(config.data, config.data.train_split)
    host = data.make_train(config, source)
    batches = to_devices(host, batch_sharding(make_mesh(1)))
    waited, begin = 0.0, 0.0
    for step in range(steps + 3):
        if step == 3:
            waited, begin = 0.0, time.perf_counter()
        asked = time.perf_counter()
        next(batches)["image"].block_until_ready()
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
    total = time.perf_counter() - begin
    host.close()
    return total, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    args, config = config_args.parse(parser, None)
    config.batch_size = args.batch
    config.data.name, config.data.threads = "synthetic", 2
    total, _ = waiting(config, 0.0, args.steps)
    alone = total / args.steps
    print(f"a batch of {args.batch} takes {alone:.3f} s")
    for factor in (0.5, 1.0, 1.2, 1.5, 2.0, 3.0):
        total, waited = waiting(config, factor * alone, args.steps)
        print(f"step of {factor:.1f} batches: waiting {waited / total:.1%} of the time")


if __name__ == "__main__":
    main()
