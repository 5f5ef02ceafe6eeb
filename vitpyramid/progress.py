"""Lines of progress for what takes long, in one wording."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
_SECONDS = 10.0  # between lines


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Passes `items` on and logs, at most every ten seconds, how many of `total` have come and how long the rest takes.

    Nothing is logged for what is done in less. `what` begins the line: "indexing TFRecord files: 3 of 9, ETA 24 s".
    """
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS and done < total:
            last = now
            log.info("%s: %d of %d, ETA %s", what, done, total, format_seconds((now - start) / done * (total - done)))


@contextlib.contextmanager
def printed(wanted: bool = True) -> Iterator[None]:
    """Prints the package's lines inside, for notebooks; nothing is changed where logging shows them already."""
    package = logging.getLogger("vitpyramid")
    if not wanted or package.isEnabledFor(logging.INFO):
        yield
        return
    handler, before = logging.StreamHandler(sys.stdout), (package.level, package.propagate)
    package.addHandler(handler)
    # Not passed on: a notebook's root logger may print as well.
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        package.propagate = before[1]


def format_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 20 s`, `5 h 02 min`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
