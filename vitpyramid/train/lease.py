"""Who holds a work directory in a bucket, where there are no locks: an object that its run writes again and again.

Each writing names the generation that it replaces, and the bucket refuses it if the object is another one by now.
https://cloud.google.com/storage/docs/request-preconditions
"""

import json
import logging
import os
import threading
import time

from etils import epath

from vitpyramid.files import BUCKET, in_one_line

BEAT = 10.0  # seconds between two writings
PATIENCE = 45.0  # seconds without one after which a run counts as ended

log = logging.getLogger(__name__)


class Lease:
    """A work directory's owner, written to an object for as long as the run lives.

    One run at a time holds it. A run that was killed leaves it behind; the next one waits for `PATIENCE` to see that
    nobody writes to it any more. A run that was cut off from the bucket for longer may lose it to another one: `check`
    says so, and is called before each save.
    """

    def __init__(self, path: epath.Path):
        self._path, self._owner = path, {}
        self._client, self._generation, self._lost = None, 0, False
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self, owner: dict) -> None:
        """Takes the lease.

        Args:
          owner: who asks for it; its `token` is told from other owners'.

        Raises:
          FileExistsError: another run holds it.
          OSError: the bucket cannot be reached.
        """
        from google.cloud import storage

        with in_one_line(self._path):
            self._client = storage.Client()
            blob = self._blob()
            there = seen = self._look(blob)
            if there:
                log.info("%s: waiting %.0f s to see whether that run still lives", self._path, PATIENCE)
            deadline = time.monotonic() + PATIENCE
            while seen and time.monotonic() < deadline:
                time.sleep(BEAT / 5)
                seen = self._look(blob)
                if seen not in (0, there):
                    raise FileExistsError(self._path)
            self._owner, self._generation = owner, seen
            self._write()
        if self._lost:
            raise FileExistsError(self._path)
        self._thread.start()

    def check(self) -> None:
        """Raises `OSError` if another run has taken the work directory over."""
        if self._thread.is_alive():
            self._try_to_write()
        if self._lost:
            raise OSError(f"{self._path.parent}: another run has taken this folder over; nothing more is saved")

    def release(self) -> None:
        """Lets go of it, if it is held."""
        self._ended.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        if self._lost:
            return
        try:
            with in_one_line(self._path):
                self._blob().delete(if_generation_match=self._generation)
        except OSError as error:
            log.warning("not removed, the next run will wait: %s", error)

    def _beat(self) -> None:
        while not self._lost and not self._ended.wait(BEAT):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            with in_one_line(self._path):
                self._write()
        except OSError as error:
            log.warning("cannot say that this run lives: %s", error)

    def _write(self) -> None:
        from google.api_core.exceptions import PreconditionFailed

        with self._writing:
            if self._lost:  # found out by the other thread: the generation is the new owner's
                return
            blob = self._blob()
            content = json.dumps(self._owner | {"beat": time.time()})
            try:
                blob.upload_from_string(content, if_generation_match=self._generation)
                self._generation = blob.generation
            except PreconditionFailed:
                # It may have been this run's own writing, whose answer was lost.
                self._generation = self._look(self._blob())
                self._lost = self._token() != self._owner["token"]

    def _blob(self):
        bucket, _, name = os.fspath(self._path).removeprefix(BUCKET).partition("/")
        return self._client.bucket(bucket).blob(name)

    def _look(self, blob) -> int:
        """The object's generation; 0 if there is none."""
        from google.api_core.exceptions import NotFound

        try:
            blob.reload()
        except NotFound:
            return 0
        return blob.generation

    def _token(self) -> str:
        """Of whoever holds it now; empty if that cannot be read."""
        from google.api_core.exceptions import NotFound

        try:
            return json.loads(self._blob().download_as_bytes())["token"]
        except (NotFound, ValueError, KeyError):
            return ""
