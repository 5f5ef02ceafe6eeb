"""SIGTERM and SIGINT as a request: save, then leave."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `requested(step)`: True at the step after which every process should stop.

    The first SIGTERM or SIGINT is a request; a second SIGINT interrupts at once. With several processes the
    coordination service picks one step for all of them, for which each must ask at every step.
    """
    received = []

    def handle(signum, frame):
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    def requested(step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(received)

    # With several processes the coordination service listens for SIGTERM itself.
    signals = () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    previous = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
