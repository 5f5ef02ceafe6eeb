"""Random access to TFRecord files, without TensorFlow.

A record is its length (uint64), the length's checksum (uint32), the data, and the data's checksum (uint32), all little
endian: `tensorflow/core/lib/io/record_writer.h`. Nothing says where the n-th record begins, so the lengths of a file
are read once and the offsets kept in the user's cache folder, under a name made from the file's path, size and time, or
its version in a bucket.
"""

import concurrent.futures
import functools
import hashlib
import io
import logging
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import platformdirs

from vitpyramid.data.shards import Shards, check_counts
from vitpyramid.files import bucket_files, in_bucket, read_bytes, write_atomically
from vitpyramid.progress import with_progress

log = logging.getLogger(__name__)
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_FRAME = _HEADER.size + _FOOTER.size
_THREADS = 16  # that index files; more than the cores, for file systems that answer slowly


class TFRecords(Sequence[bytes]):
    """The records of a split of TFRecord files; picklable. Checksums are verified at every reading."""

    def __init__(self, instructions: Sequence):
        """Indexes the files that were not indexed before.

        Args:
          instructions: TFDS's, of the split: `builder.info.splits[split].file_instructions`.

        Raises:
          ValueError: a file is missing, cut off, damaged in a record's length, or has not as many records as it should.
        """
        self._shards = Shards(instructions)
        offsets = index_files(list(dict.fromkeys(self._shards.paths)))
        check_counts(instructions, {path: len(starts_and_end) - 1 for path, starts_and_end in offsets.items()})
        self._offsets = [offsets[path] for path in self._shards.paths]

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> bytes:
        path, _, start, end = self._locate(index)
        # Opened for each record: 5 us on a local disk, and a thousand files held open are more than many systems allow.
        record = read_bytes(path, start, end)
        data = record[_HEADER.size : -_FOOTER.size]
        if len(record) < end - start or _HEADER.unpack_from(record)[0] != len(data):
            raise ValueError("the file was changed after it had been opened")
        if _FOOTER.unpack_from(record, len(record) - _FOOTER.size)[0] != _masked_checksum(data):
            raise ValueError("checksum mismatch")
        return data

    def where(self, index: int) -> str:
        """The record's file and place in it, for messages."""
        path, position, start, _ = self._locate(index)
        return f"{path}, record {position}, byte {start}"

    def _locate(self, index: int) -> tuple[str, int, int, int]:
        shard, position = self._shards.locate(index)
        start, end = self._offsets[shard][position : position + 2]
        return self._shards.paths[shard], position, int(start), int(end)


def index_files(paths: Sequence[str]) -> dict[str, np.ndarray]:
    """The offsets of each file's records and, last, its size: uint64 [records + 1].

    Raises:
      ValueError: see `scan`; or a file cannot be read.
    """
    cache = cache_folder("tfrecord")
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        indexed = executor.map(functools.partial(_index_file, cache=cache), paths)
        return dict(zip(paths, with_progress(indexed, len(paths), "indexing TFRecord files"), strict=True))


def scan(path: str) -> np.ndarray:
    """Reads the lengths of a file's records.

    Returns:
      The offset of each record in bytes and, last, the file's size: uint64 [records + 1].

    Raises:
      ValueError: the file is cut off, or a length is damaged; with the file and the offset.
      OSError: it cannot be read.
    """
    offsets = [0]
    # From a bucket large pieces, one after the other: a request for each record would take longer.
    with bucket_files().open(path) if in_bucket(path) else open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        while offsets[-1] < size:
            file.seek(offsets[-1])
            header = file.read(_HEADER.size)
            place = f"{path}: record {len(offsets) - 1} at byte {offsets[-1]}"
            if len(header) < _HEADER.size:
                raise ValueError(f"{place} is cut off, the file ends at {size}.")
            length, checksum = _HEADER.unpack(header)
            if checksum != _masked_checksum(header[:8]):
                raise ValueError(f"{place} has a damaged length (checksum mismatch), or the file is no TFRecord file.")
            offsets.append(offsets[-1] + _FRAME + length)
            if offsets[-1] > size:
                raise ValueError(f"{place} is cut off: it should end at {offsets[-1]}, the file ends at {size}.")
    return np.asarray(offsets, np.uint64)


def _index_file(path: str, cache: Path | None) -> np.ndarray:
    try:
        key, size = _version(path)
        if cache is None:
            return scan(path)
        cached = cache / f"{hashlib.sha256(os.fsencode(key)).hexdigest()}.npy"
        offsets = _load(cached, size)
        if offsets is None:
            offsets = scan(path)
            _save(cached, offsets)
        return offsets
    except ValueError:
        raise
    except Exception as error:  # broad: the clients of buckets raise others than OSError
        raise ValueError(f"{path}: cannot be read ({error}).") from error


def _version(path: str) -> tuple[str, int]:
    """What tells a file's content from others, and its size."""
    if in_bucket(path):
        held = bucket_files().info(path)
        return f"{path}\0{held['generation']}", held["size"]
    stat = os.stat(path)
    return f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}", stat.st_size


def _load(cached: Path, size: int) -> np.ndarray | None:
    try:
        offsets = np.load(cached)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None
    ok = offsets.dtype == np.uint64 and offsets.ndim == 1 and offsets.size > 0 and offsets[-1] == size
    return offsets if ok else None


def _save(cached: Path, offsets: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, offsets)
    try:
        write_atomically(cached, content.getvalue())
    except OSError as error:
        log.warning("the index of a TFRecord file was not kept and will be made again: %s", error)


def cache_folder(kind: str) -> Path | None:
    """A folder of the user's cache folder; None, and a warning, where nothing can be written there."""
    folder = Path(platformdirs.user_cache_dir("vitpyramid")) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("indices of data sets are not kept, each run makes them again: %s", error)
        return None


def _masked_checksum(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord files have it."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
