"""Files that are there whole or not at all, on this machine and in buckets of Google Cloud Storage.

A bucket's client raises errors of many libraries; the functions here make an `OSError` of one line of them.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from etils import epath

BUCKET = "gs://"


def as_path(name: str | os.PathLike) -> Path | epath.Path:
    """A path on this machine or, for gs://bucket/name, in a bucket; `pathlib` would make a local folder `gs:` of it.

    Those on this machine are no `epath.Path`: its `stat` fails for users without a name, as in containers.

    Raises:
      ValueError: another scheme, or gcsfs is not installed.
    """
    scheme, separator, _ = os.fspath(name).partition("://")
    if not separator:
        return Path(name)
    if not in_bucket(name):
        raise ValueError(f"{name}: expected a path or {BUCKET}BUCKET/NAME, {scheme}:// is neither")
    if find_spec("gcsfs") is None:
        raise ValueError(f"{name}: expected gcsfs: pip install 'vitpyramid[gcs]'")
    _configure()
    return epath.Path(name)


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path begins with gs://."""
    return os.fspath(path).startswith(BUCKET)


def bucket_files():
    """What lies in buckets, as an `fsspec.AbstractFileSystem`; paths begin with gs://."""
    import fsspec

    _configure()
    return fsspec.filesystem("gcs")


def _configure() -> None:
    """What holds for epath's use of gcsfs and fsspec too."""
    import fsspec  # comes with gcsfs

    os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed, epath would load it
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # TensorStore and other hosts write as well
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors with their stacks, and raises them


@contextlib.contextmanager
def in_one_line(path: str | os.PathLike) -> Iterator[None]:
    """Whatever a bucket's client raises becomes an OSError; a file that is not there stays a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    # Broad: of aiohttp, requests, google.auth, google.api_core and gcsfs, none of which is an OSError throughout.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(f"{path}: {reason}") from error


def reach(path: Path | epath.Path) -> None:
    """Asks a bucket for one name; nothing is done for a path on this machine.

    Raises:
      OSError: no such bucket, no permission, no credentials or no connection.
    """
    if not in_bucket(path):
        return
    bucket = os.fspath(path).removeprefix(BUCKET).partition("/")[0]
    try:
        with in_one_line(path):
            bucket_files().call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no bucket {bucket!r}") from error
    except OSError as error:
        hint = "credentials are those of `gcloud auth application-default login` or of the machine's service account"
        raise OSError(f"{error} ({hint})") from error


def read_bytes(path: str | bytes, start: int = 0, end: int | None = None) -> bytes:
    """A file's bytes from `start` to `end`, or to where the file ends, in one request."""
    name = os.fsdecode(path)
    if in_bucket(name):
        with in_one_line(name):
            return bucket_files().cat_file(name, start=start or None, end=end)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file in one step, so that a reader never sees half of it; of several writers the last one wins.

    Args:
      path: in a folder that exists.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written; what was there before stays.
    """
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with in_one_line(path):
            return bucket_files().pipe_file(os.fspath(path), content)  # an object appears when all of it is there
    folder, name = os.path.split(os.fspath(path))
    # Not from `tempfile`, whose files only their owner may read. A process id is not enough: hosts share folders.
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
