"""SIGTERM and SIGINT as a request: save, then leave."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `requested()`: True once every process should stop.

    The first SIGTERM or SIGINT is a request; a second SIGINT interrupts at once. With several processes, where a signal
    to any of them is one, the coordination service picks the call at which all of them hear of it, so all must call
    alike: after each step, and after each batch of an evaluation. Outside of a process's main thread, which alone is
    told of signals, nothing is a request.
    """
    received, calls = [], itertools.count(1)

    def handle(signum, frame):
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    def pass_on(signum, frame):
        # The coordination service listens for SIGTERM, below Python, and tells the other processes.
        os.kill(os.getpid(), signal.SIGTERM)

    def requested() -> bool:
        if jax.process_count() > 1 and not received and multihost_utils.reached_preemption_sync_point(next(calls)):
            received.append(signal.SIGTERM)
        return bool(received)

    several = jax.process_count() > 1
    handlers = {signal.SIGINT: pass_on} if several else {signal.SIGTERM: handle, signal.SIGINT: handle}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
