"""Whether a checkpoint is what was written: a checksum of each of its files, verified before it is read."""

import itertools
import json
import logging
from pathlib import Path

import google_crc32c

from vitpyramid.files import write_atomically

SUMS = "checksums.json"  # in the folder of a step: {file: [bytes, CRC-32C]}
_ITEMS = ("meta", "state")
_NEEDED = ("_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA")
_CHUNK = 1 << 20

log = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Writes the checksums of a step, all of whose arrays and metadata are in `folder`."""
    files = [file for item in _ITEMS for file in sorted((folder / item).rglob("*")) if file.is_file()]
    sums = {str(file.relative_to(folder)): _sum(file) for file in files if file.name != "commit_success.txt"}
    write_atomically(folder / SUMS, json.dumps(sums))


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
        (checkpoints / str(damaged)).rename(next(name for name in names if not name.exists()))
    return step if found else None


def steps(checkpoints: Path) -> list[int]:
    """Steps that are there under their final names, the newest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), reverse=True)


def damage(folder: Path) -> str:
    """What is wrong with a step's folder; empty if nothing is.

    A step without checksums, of another version of this program, is only looked through.
    """
    for name in _NEEDED:
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            return f"has no {name}"
    try:
        sums = json.loads((folder / SUMS).read_text())
        json.loads((folder / "meta" / "metadata").read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        return "has damaged metadata"
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            return f"has no {name}"
        if file.stat().st_size != expected[0]:
            return f"has {file.stat().st_size} bytes of {name}, {expected[0]} were written"
        if _sum(file) != expected:
            return f"has other bytes in {name} than were written"
    return ""


def _sum(file: Path) -> list[int]:
    """Bytes and CRC-32C of a file."""
    sum_ = google_crc32c.Checksum()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            sum_.update(chunk)
    return [file.stat().st_size, int.from_bytes(sum_.digest(), "big")]
