"""A trace of a few training steps, for XProf or TensorBoard's profile page."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

log = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(config: ConfigDict, folder: Path) -> Iterator[Callable]:
    """Traces `config.steps` steps into `folder`, each process what its devices do.

    Yields `(taken, state)`, to be called before every step with how many this process has taken and what the last one
    gave. A trace that is open at the end is closed.
    """
    tracing = False

    def before_step(taken: int, state) -> None:
        nonlocal tracing
        if config.steps and taken == config.start:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
            tracing = True
        elif tracing and taken == config.start + config.steps:
            jax.block_until_ready(state)
            close()

    def close() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        log.info("wrote a profile to %s (pip install xprof; xprof %s)", folder / "plugins" / "profile", folder)

    try:
        yield before_step
    finally:
        if tracing:
            close()
