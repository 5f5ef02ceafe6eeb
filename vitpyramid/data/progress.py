"""Lines of progress for what takes long before training starts."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
_SECONDS = 10.0  # between lines


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Passes `items` on and logs, at most every ten seconds, how many of `total` have come and how long the rest takes.

    Nothing is logged for what is done in less. `what` begins the line: "indexing TFRecord files".
    """
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS and done < total:
            last = now
            log.info("%s: %d of %d, %.0f s left", what, done, total, (now - start) / done * (total - done))
