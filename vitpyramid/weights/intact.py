"""Whether a checkpoint is what was written: a checksum of each of its files, verified before it is read.

In a bucket, which renames no folder, a step has its final name from the start, and it is complete when `COMMIT` is in
it; Orbax removes folders without one from `checkpoints`. Checksums are those that the bucket keeps of its objects.
"""

import base64
import itertools
import json
import logging
import os
from pathlib import Path

import google_crc32c

from vitpyramid.files import BUCKET, bucket_files, in_bucket, write_atomically

SUMS = "checksums.json"  # in the folder of a step: {file: [bytes, CRC-32C]}
_ITEMS = ("meta", "state")
_NEEDED = ("_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA")
_CHUNK = 1 << 20
COMMIT = "commit_success.txt"  # Orbax's

log = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Writes the checksums of a step, all of whose arrays and metadata are in `folder`."""
    if in_bucket(folder):
        sums = {name: held for name, held in _held(folder).items() if name.partition("/")[0] in _ITEMS}
    else:
        files = [file for item in _ITEMS for file in sorted((folder / item).rglob("*")) if file.is_file()]
        sums = {str(file.relative_to(folder)): _sum(file) for file in files}
    sums = {name: held for name, held in sums.items() if not name.endswith(COMMIT)}
    write_atomically(folder / SUMS, json.dumps(sums))


def seal_written(checkpoints: Path) -> None:
    """Seals the step all of whose files are written, and which is about to be made complete."""
    for folder in checkpoints.iterdir():
        if _is_uncommitted(folder) if in_bucket(folder) else ".orbax-checkpoint-tmp" in folder.name:
            seal(folder)


def newest_intact(checkpoints: Path, set_aside: bool = False) -> int | None:
    """The newest step whose files are as they were written; None if no step is there at all.

    Each one that is passed over is named in a warning and stays; with `set_aside` its folder is renamed, so that the
    steps after the one that is found can be saved again.

    Raises:
      OSError: there are steps, and none is intact.
    """
    found = steps(checkpoints)
    problems = {}
    for step in found:
        if not (problem := damage(checkpoints / str(step))):
            break
        problems[step] = problem
        log.warning("skipped the checkpoint %s/%d: %s", checkpoints, step, problem)
    if found and len(problems) == len(found):
        raise OSError(f"{checkpoints}: expected an intact checkpoint, {found[0]} {problems[found[0]]}, nor is another")
    for damaged in problems if set_aside else ():
        names = (checkpoints / f"{damaged}.damaged-{number}" for number in itertools.count(1))
        _set_aside(checkpoints / str(damaged), next(name for name in names if not name.exists()))
    return step if found else None


def _set_aside(folder: Path, name: Path) -> None:
    if in_bucket(folder):
        # File by file: one that is moved in part must not be taken for a step, nor, by Orbax, for the rest of a save.
        write_atomically(name / COMMIT, "")
        (folder / COMMIT).unlink()
        for file in _held(folder):
            bucket_files().mv(os.fspath(folder / file), os.fspath(name / file))
    else:
        folder.rename(name)


def steps(checkpoints: Path) -> list[int]:
    """Steps that are there under their final names, and complete, the newest first."""
    if not checkpoints.is_dir():
        return []
    named = (path for path in checkpoints.iterdir() if path.name.isdecimal())
    return sorted((int(path.name) for path in named if not _is_uncommitted(path)), reverse=True)


def _is_uncommitted(folder: Path) -> bool:
    return in_bucket(folder) and folder.name.isdecimal() and not (folder / COMMIT).exists()


def damage(folder: Path) -> str:
    """What is wrong with a step's folder; empty if nothing is.

    A step without checksums, of another version of this program, is only looked through.
    """
    measure = _held(folder).get if in_bucket(folder) else lambda name: _sum(folder / name)
    for name in _NEEDED:
        if not (measure(name) or [0])[0]:
            return f"has no {name}"
    try:
        sums = json.loads((folder / SUMS).read_text())
        json.loads((folder / "meta" / "metadata").read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        return "has damaged metadata"
    for name, expected in sums.items():
        found = measure(name)
        if found is None:
            return f"has no {name}"
        if found[0] != expected[0]:
            return f"has {found[0]} bytes of {name}, {expected[0]} were written"
        if found != expected:
            return f"has other bytes in {name} than were written"
    return ""


def _held(folder: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32C of all objects below a folder of a bucket, out of one listing: no file is read."""
    found = bucket_files().find(os.fspath(folder), detail=True)
    skip = len(os.fspath(folder).removeprefix(BUCKET)) + 1
    return {
        name[skip:]: [about["size"], int.from_bytes(base64.b64decode(about["crc32c"]), "big")]
        for name, about in found.items()
    }


def _sum(file: Path) -> list[int] | None:
    """Bytes and CRC-32C of a file; None if there is none."""
    if not file.is_file():
        return None
    sum_, size = google_crc32c.Checksum(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            sum_.update(chunk)
            size += len(chunk)
    return [size, int.from_bytes(sum_.digest(), "big")]
