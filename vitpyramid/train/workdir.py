"""A run's work directory: held by one run at a time, and the same one for all of its processes."""

import contextlib
import datetime
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from vitpyramid.files import as_path, in_bucket, reach, write_atomically
from vitpyramid.tasks.task import ConfigError
from vitpyramid.train.lease import Lease

LOCK, OWNER = ".lock", ".owner.json"
_LONGEST = 1000  # characters of an error that goes to the other processes
_PATIENCE = 30.0  # seconds until a file written by one host is seen by another

log = logging.getLogger(__name__)


def open_workdir(name: str | os.PathLike) -> Path:
    """The path of a work directory, on this machine or in a bucket.

    Raises:
      ConfigError: it is in neither, or what reads buckets is not installed.
      OSError: there is no such bucket, or it cannot be reached.
    """
    try:
        workdir = as_path(name)
    except ValueError as error:
        raise ConfigError(f"--workdir={error}") from error
    reach(workdir)
    return workdir


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds a work directory for as long as a run lives; the operating system lets go of it when the process ends.

    The lock is `flock`'s: it holds between processes of one machine and, on network file systems that carry it (NFS
    from version 4 on), between machines. Where a file system has no locks, a warning says so and nothing is held.
    What holds in a bucket is said at `Lease`.

    Yields:
      What raises `OSError` if another run has taken the work directory over; to be called before a save.

    Raises:
      ConfigError: another run holds it, or the processes of this one do not see the same folder.
      OSError: it cannot be written to.
    """
    lease = Lease(workdir / OWNER) if in_bucket(workdir) else None
    lock = lease or filelock.FileLock(workdir / LOCK)

    def take() -> str:
        owner = {"process": os.getpid(), "host": socket.gethostname(), "token": uuid.uuid4().hex}
        owner["since"] = datetime.datetime.now().isoformat(" ", "seconds")
        try:
            if lease:
                lease.acquire(owner)
            else:
                lock.acquire(blocking=False)
        except (filelock.Timeout, FileExistsError) as error:
            raise ConfigError(f"--workdir={workdir}: {_owner(workdir)}. End that run first, or use another") from error
        except NotImplementedError:
            log.warning("--workdir=%s: its file system has no locks; make sure that no other run uses it", workdir)
        if not lease:
            write_atomically(workdir / OWNER, json.dumps(owner))
        return owner["token"]

    try:
        _check_is_shared(workdir, agreed(take))
        yield lease.check if lease else lambda: None
    finally:
        lock.release()


def agreed(ask: Callable[[], Any]) -> Any:
    """What `ask` says on the first process, on all of them: a number, a short text or None.

    Raises:
      ConfigError, OSError: where `ask` did on the first process.
    """
    if jax.process_count() == 1:
        return ask()
    answer = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": ask()}
        except (ConfigError, OSError) as error:
            answer = {"error": str(error)[:_LONGEST], "is_config": isinstance(error, ConfigError)}
    text = json.dumps(answer).encode().ljust(8 * _LONGEST)  # of one length; a character takes up to 6 bytes
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))))
    if "error" in answer:
        raise (ConfigError if answer["is_config"] else OSError)(answer["error"])
    return answer["value"]


def _check_is_shared(workdir: Path, token: str) -> None:
    """Raises `ConfigError` on all processes if one of them does not find what the first has written."""
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + _PATIENCE
    while not (seen := _read_owner(workdir).get("token") == token) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)).ravel())
    if blind.size:
        raise ConfigError(
            f"--workdir={workdir}: expected one folder that all {jax.process_count()} processes see, such as one on a "
            f"network file system; process {', '.join(map(str, blind))} sees another than process 0"
        )


def _owner(workdir: Path) -> str:
    owner = _read_owner(workdir)
    if not owner:
        return "another run is starting there"
    return f"process {owner['process']} on {owner['host']} has been running there since {owner['since']}"


def _read_owner(workdir: Path) -> dict:
    try:
        return json.loads((workdir / OWNER).read_text())
    except (OSError, ValueError):
        return {}
