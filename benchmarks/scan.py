"""What `remat` and `scan` cost and save: compile time, step time and memory of a training step, against neither.

python benchmarks/scan.py --model=pvt_small --size=224 --batch=8 --repeats=5

Prints seconds of CPU time to compile, seconds a step (median) and the compiler's own figure of temporary memory, then
the last three as ratios to the unrolled network. Compiled anew in every run: no cache.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from vitpyramid import create_model
from vitpyramid.models.stack import stack_blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pvt_small")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    images = jax.random.normal(jax.random.key(1), (args.batch, args.size, args.size, 3))
    plain = create_model(args.model)
    params = jax.jit(plain.init)(jax.random.key(0), images[:1])["params"]
    kinds = {
        "unrolled": (plain, params),
        "remat": (plain.clone(remat=True), params),
        "remat + scan": (plain.clone(remat=True, scan=True), stack_blocks(params, plain.stages)),
    }
    compiled, seconds, memory = {}, {}, {}
    for kind, (model, weights) in kinds.items():
        step = jax.jit(jax.grad(lambda p, x, model=model: jnp.square(model.apply({"params": p}, x, train=True)).sum()))
        lowered = step.lower(weights, images)
        start = time.process_time()
        compiled[kind] = lowered.compile()
        seconds[kind] = time.process_time() - start
        memory[kind] = compiled[kind].memory_analysis().temp_size_in_bytes
        jax.block_until_ready(compiled[kind](weights, images))
    times = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind, (_, weights) in kinds.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[kind](weights, images))
            times[kind].append(time.perf_counter() - start)
    base = "unrolled"
    print("| | compile, s | step, s | temporary MiB | ratios |\n|---|---|---|---|---|")
    for kind in kinds:
        step_seconds = statistics.median(times[kind])
        ratios = (
            seconds[kind] / seconds[base],
            step_seconds / statistics.median(times[base]),
            memory[kind] / memory[base],
        )
        print(
            f"| {kind} | {seconds[kind]:.1f} | {step_seconds:.2f} | {memory[kind] / 2**20:.0f} | "
            + " / ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )


if __name__ == "__main__":
    main()
