"""A trace of a few training steps, for XProf or TensorBoard's profile page."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vitpyramid.files import bucket_files, in_bucket, in_one_line

log = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(config: ConfigDict, folder: Path) -> Iterator[Callable]:
    """Traces `config.steps` steps into `folder`, each process what its devices do.

    Yields `(taken, state)`, to be called before every step with how many this process has taken and what the last one
    gave. A trace that is open at the end is closed.
    """
    tracing = False
    local = tempfile.TemporaryDirectory() if in_bucket(folder) and config.steps else None  # JAX writes to disks alone

    def before_step(taken: int, state) -> None:
        nonlocal tracing
        if taken == config.start and config.steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(local.name if local else str(folder))
            tracing = True
        elif tracing and taken == config.start + config.steps:
            jax.block_until_ready(state)
            close()

    def close() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        if local:
            with in_one_line(folder):
                bucket_files().put(f"{local.name}/", f"{folder}/", recursive=True)
            local.cleanup()
        log.info("wrote a profile to %s (pip install xprof; xprof %s)", folder / "plugins" / "profile", folder)

    try:
        yield before_step
    finally:
        if tracing:
            close()
