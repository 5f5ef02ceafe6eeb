"""Images in class folders, `data_dir/SPLIT/CLASS/...`, with the rules of torchvision's `ImageFolder`.

The classes are the folders in SPLIT, sorted by name; the images of a class are the files with an image's extension
anywhere below its folder. Unlike torchvision, GIF is an image, names that begin with a dot are left out, and a class
may be empty.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vitpyramid.data.splits import split_names, split_ranges, unknown_split
from vitpyramid.files import as_path, bucket_files, in_bucket, in_one_line, read_bytes
from vitpyramid.progress import with_progress

log = logging.getLogger(__name__)
EXTENSIONS = frozenset(b".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm".split())
_THREADS = 16  # that list folders; more than the cores, for file systems that answer slowly
_SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Encoded images and their labels. Paths lie in one piece of memory: a million strings would take four times that.

    Attributes:
      folder: the paths below are relative to it.
      paths: all paths, one after the other.
      ends: where each ends in `paths`, int64 [n].
      labels: int32 [n].
    """

    folder: bytes
    paths: bytes
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_bytes(self._path(index)), "label": int(self.labels[index])}

    def where(self, index: int) -> str:
        """The file, for messages."""
        return _shown(self._path(index))

    def _path(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)}).")
        start = self.ends[index - 1] if index else 0
        return os.path.join(self.folder, self.paths[start : self.ends[index]])


def open_folder(data_config, split: str) -> tuple[FolderRecords, tuple[str, ...]]:
    """Lists the images of a split.

    Their order is that of a hash of their path below SPLIT: as good as random, so that "train[:90%]" takes about as
    much of every class, the same on every machine, and hardly changed by a file that is added.

    Args:
      data_config: `config.data`; reads `data_dir`, also gs://..., `train_split`, `eval_split` and `on_corrupt`.
      split: "train", "train[:99%]", "train+val": TFDS's syntax over the names of the folders in `data_dir`.

    Returns:
      The records, and the names of the classes.

    Raises:
      ValueError: no such folder, or one that cannot be listed; the splits' class folders differ; folders linked in a
        circle; or, with `on_corrupt` "error", links to files that are not there.
    """
    root = os.fsencode(os.path.expanduser(data_config.data_dir))
    try:
        available = [os.fsdecode(name) for name in _folders_in(root)]
        names = _named_folders(split, available)
        if missing := [name for name in names if name not in available]:
            raise unknown_split("folder", split, available, f"there is no folder {missing[0]!r} in {_shown(root)}")
        classes = _common_classes(root, data_config, names, available)
        listings = {name: _list_split(root, name, classes) for name in dict.fromkeys(names)}
    except OSError as error:
        what = f"{_shown(error.filename)}: {error.strerror}" if error.filename else str(error)
        raise ValueError(f"data.data_dir: cannot list {what}.") from error
    broken = [path for listing in listings.values() for path in listing.broken]
    if broken and data_config.on_corrupt == "error":
        raise ValueError(f"data.data_dir: links to files that are not there: {_some(broken)}.")
    if split in available:
        ranges = [(split, range(len(listings[split].paths)))]
    else:
        ranges = split_ranges("folder", split, {name: len(listing.paths) for name, listing in listings.items()})
    paths = [listings[name].paths[i] for name, positions in ranges for i in positions]
    labels = [listings[name].labels[i] for name, positions in ranges for i in positions]
    ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
    return FolderRecords(root, b"".join(paths), ends, np.asarray(labels, np.int32)), tuple(map(os.fsdecode, classes))


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The images of a split in their order; `broken` are those among them that are links to nothing."""

    paths: list[bytes]
    labels: list[int]
    broken: list[bytes]


def _list_split(root: bytes, split: str, classes: list[bytes]) -> _Listing:
    folder = os.path.join(os.fsencode(split), b"")
    tops = [os.path.join(root, folder, name) for name in classes]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        found = executor.map(lambda top: list(_images_below(top, frozenset())), tops)
        per_class = list(with_progress(found, len(tops), f"listing class folders of {split!r}"))
    if empty := [name for name, images in zip(classes, per_class, strict=True) if not images]:
        log.warning("data.data_dir: %d classes of %r have no image: %s", len(empty), split, _some(empty))
    skip = len(os.path.join(root, b""))
    images = [(path[skip:], label, broken) for label, one in enumerate(per_class) for path, broken in one]
    images.sort(key=lambda image: (_hash(image[0][len(folder) :]), image[0]))
    broken = [path for path, _, broken in images if broken]
    return _Listing([path for path, _, _ in images], [label for _, label, _ in images], broken)


def _images_below(folder: bytes, above: frozenset) -> Iterator[tuple[bytes, bool]]:
    """The path of each image, and whether it is a broken link. `above` are the folders that this one lies in."""
    if in_bucket(os.fsdecode(folder)):
        with in_one_line(os.fsdecode(folder)):
            found = bucket_files().find(os.fsdecode(folder))
        paths = (os.fsencode(f"gs://{name}") for name in found)
        below = ((path, path[len(folder) :]) for path in paths)
        yield from ((path, False) for path, name in below if b"/." not in name and _is_image(name))
        return
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in above:
        raise ValueError(f"data.data_dir: {_shown(folder)} links back to a folder that it lies in.")
    above |= {(stat.st_dev, stat.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, above)
            elif _is_image(entry.name) and (entry.is_file() or entry.is_symlink()):
                yield entry.path, not entry.is_file()


def _is_image(name: bytes) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _common_classes(root: bytes, data_config, names: list[str], available: list[str]) -> list[bytes]:
    """The class folders, which have to be the same ones in all splits that the config names."""
    configured = [data_config.train_split, data_config.eval_split]
    used = [name for split in configured for name in _named_folders(split, available) if name in available]
    used = list(dict.fromkeys(used + names))
    first, *others = [_folders_in(os.path.join(root, os.fsencode(name))) for name in used]
    if not first:
        folder = os.path.join(root, os.fsencode(used[0]))
        inside = _some(sorted(os.fsencode(path.name) for path in as_path(os.fsdecode(folder)).iterdir()))
        raise ValueError(
            f"data.data_dir: {used[0]!r} has no class folders, expected SPLIT/CLASS/IMAGE; it has {inside}."
        )
    for name, classes in zip(used[1:], others, strict=True):
        missing, unknown = sorted(set(first) - set(classes)), sorted(set(classes) - set(first))
        if missing or unknown:
            raise ValueError(
                f"data.data_dir: the class folders of {name!r} are not those of {used[0]!r}: missing "
                f"{_some(missing)}; unknown {_some(unknown)}. A label is a folder's place in the sorted list, so all "
                "splits need the same folders; they may be empty."
            )
    return first


def _named_folders(split: str, available: list[str]) -> list[str]:
    """The folders that a split means; a folder's name that TFDS's syntax has no room for ("train set") means itself."""
    return [split] if split in available else split_names(split)


def _folders_in(folder: bytes) -> list[bytes]:
    """Names in torchvision's order, which is that of the decoded names."""
    path = os.fsdecode(folder)
    if in_bucket(path):
        with in_one_line(path):
            entries = bucket_files().ls(path, detail=True)
        folders = [os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"]
        return [os.fsencode(name) for name in sorted(folders) if not name.startswith(".")]
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(b".") and entry.is_dir()]
    return sorted(names, key=os.fsdecode)


def _hash(path: bytes) -> bytes:
    return hashlib.blake2b(path.replace(os.fsencode(os.sep), b"/"), digest_size=8).digest()


def _shown(path: bytes) -> str:
    """Quoted, since names may hold line breaks and bytes that are no text."""
    return repr(os.fsdecode(path))


def _some(names: list[bytes]) -> str:
    shown = ", ".join(map(_shown, names[:_SHOWN]))
    return (f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown) or "none"
