"""SIGTERM and SIGINT as a request: save, then leave."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `requested()`: True once every process should stop.

    The first SIGTERM or SIGINT is a request; a second SIGINT interrupts at once. With several processes the
    coordination service picks the call at which all of them hear of it, so all must call alike: after each step, and
    after each batch of an evaluation.
    """
    received, calls = [], itertools.count(1)

    def handle(signum, frame):
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    def requested() -> bool:
        if jax.process_count() > 1 and not received and multihost_utils.reached_preemption_sync_point(next(calls)):
            received.append(signal.SIGTERM)
        return bool(received)

    # With several processes the coordination service listens for SIGTERM itself.
    signals = () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    previous = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
