"""Two programs timed in turns, so that a busy machine slows both."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def compare(title: str, sides: Mapping[str, Mapping[str, Callable]], repeats: int) -> None:
    """Prints medians and the median ratio of "torch" to "jax" for each kind of work, "forward" and "step".

    Args:
      sides: "jax" and "torch", in the order of their turns; functions by kind, which return when the work is done.
      repeats: timed rounds, after one that is not.
    """
    for kind in ("forward", "step"):
        seconds = {side: [] for side in sides}
        for _ in range(repeats + 1):
            for side, functions in sides.items():
                start = time.perf_counter()
                functions[kind]()
                seconds[side].append(time.perf_counter() - start)
        ours, theirs = (np.array(seconds[side][1:]) for side in ("jax", "torch"))
        print(
            f"{title} {kind:8s} jax {np.median(ours):.3f} s, torch {np.median(theirs):.3f} s,"
            f" torch / jax {np.median(theirs / ours):.2f}",
            flush=True,
        )
