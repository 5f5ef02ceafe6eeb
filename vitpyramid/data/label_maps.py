"""Images and label maps in folders: ADE20K's 150 classes as in ADEChallengeData2016, and data of one's own.

`data_dir/images/SPLIT/NAME.jpg` beside `data_dir/annotations/SPLIT/NAME.png`, of one size. Levels of the maps of ADE20K
are 1 to 150, and 0 for nothing; of one's own they are classes from 0, and 255 for nothing, and `data_dir/classes.txt`
names the classes, one a line.
"""

import concurrent.futures
import dataclasses
import functools
import os

import numpy as np
from PIL import Image

from vitpyramid.data.annotations import IGNORED, Example, Findings
from vitpyramid.data.folder import EXTENSIONS
from vitpyramid.data.splits import split_names, split_ranges, unknown_split
from vitpyramid.files import as_path, read_bytes
from vitpyramid.progress import with_progress

_THREADS = 16  # that read headers; more than the cores, for file systems that answer slowly
_ADE20K_CLASSES = 150
_ADE20K_NAMES = "objectInfo150.txt"  # a table with a header, names in its last column


@dataclasses.dataclass(frozen=True)
class LabelMapRecords:
    """Images and maps of two folders.

    Attributes:
      images, maps: the folders.
      names: of the image files, sorted; a map has the image's name with .png.
      zero_ignored: see `Example`.
    """

    images: str
    maps: str
    names: tuple[str, ...]
    zero_ignored: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        label_map = os.path.join(self.maps, _map_name(self.names[index]))
        image = read_bytes(self.where(index))
        return Example(image, label_map=read_bytes(label_map), zero_ignored=self.zero_ignored)

    def where(self, index: int) -> str:
        """The image file, for messages."""
        return os.path.join(self.images, self.names[index])

    def sizes(self) -> np.ndarray:
        """Height and width of every image, int32 [n, 2], read from the files; 1 x 1 for those that cannot be read."""
        return _image_sizes(self.images, self.names)

    def ids(self) -> list[str]:
        """Names of the images, without endings."""
        return [os.path.splitext(name)[0] for name in self.names]

    def ground_truth(self) -> dict:
        """There are no boxes here."""
        raise ValueError(f"{self.maps} holds label maps, expected a data set with boxes.")


def open_label_maps(data_config, split: str) -> tuple[LabelMapRecords, tuple[str, ...], tuple[int, ...]]:
    """Lists a split's images and maps.

    Args:
      data_config: `config.data`; reads `name` ("ade20k" or "label_maps"), `data_dir`, also gs://..., and `on_corrupt`.
      split: "training", "validation[:100]": a folder's name, or a part of it in TFDS's syntax.

    Returns:
      The records, the names of the classes, and their levels in the files.

    Raises:
      ValueError: no such split, no names of classes, or, with `on_corrupt` "error", an image without a map.
    """
    name, root = data_config.name, as_path(os.path.expanduser(data_config.data_dir))
    classes = _ade20k_classes(root) if name == "ade20k" else _named_classes(root)
    try:
        available = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
        terms = set(split_names(split))
        if len(terms) > 1 or not terms <= set(available):
            raise unknown_split(name, split, available, f"expected one folder in {root / 'images'}")
        (folder,) = terms
        images = [path.name for path in (root / "images" / folder).iterdir()]
        maps = {path.name for path in (root / "annotations" / folder).glob("[!.]*.png")}
    except OSError as error:
        raise ValueError(f"data.data_dir: cannot list {error.filename or root}: {error.strerror or error}.") from error
    images = [image for image in images if os.path.splitext(image)[1].lower().encode() in EXTENSIONS]
    images = sorted(image for image in images if not image.startswith("."))
    findings = Findings(f"data.data_dir: {root / 'annotations' / folder}")
    without = [image for image in images if _map_name(image) not in maps]
    if without and data_config.on_corrupt == "error":
        raise ValueError(
            f"data.data_dir: {root / 'annotations' / folder}: {len(without)} of {len(images)} images have no label "
            f"map, such as {_map_name(without[0])!r}."
        )
    for image in without:
        findings.add("images without a label map; left out", image)
    for label_map in sorted(maps - set(map(_map_name, images))):
        findings.add("label maps without an image; left out", label_map)
    findings.log()
    names = sorted(set(images) - set(without))
    names = [names[i] for _, part in split_ranges(name, split, {folder: len(names)}) for i in part]
    zero_ignored = name == "ade20k"
    records = LabelMapRecords(
        os.fspath(root / "images" / folder), os.fspath(root / "annotations" / folder), tuple(names), zero_ignored
    )
    return records, classes, tuple(range(zero_ignored, len(classes) + zero_ignored))


def _map_name(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.png"


@functools.lru_cache(maxsize=4)
def _image_sizes(folder: str, names: tuple[str, ...]) -> np.ndarray:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
        sizes = executor.map(_image_size, (os.path.join(folder, name) for name in names))
        return np.array(list(with_progress(sizes, len(names), "reading sizes of images")), np.int32).reshape(-1, 2)


def _image_size(path: str) -> tuple[int, int]:
    try:
        with as_path(path).open("rb") as file:
            width, height = Image.open(file).size
    # Broad: as in `augment.decode`. What is wrong is told when the image is needed.
    except Exception:
        return 1, 1
    return height, width


def _ade20k_classes(root) -> tuple[str, ...]:
    """From the table beside the folders, where it is, without synonyms; else numbers."""
    path = root / _ADE20K_NAMES
    if not path.is_file():
        return tuple(str(number + 1) for number in range(_ADE20K_CLASSES))
    lines = read_bytes(os.fspath(path)).decode().splitlines()[1:]
    names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
    if len(names) != _ADE20K_CLASSES:
        raise ValueError(f"data.data_dir: {path}: has {len(names)} classes, expected {_ADE20K_CLASSES}.")
    return names


def _named_classes(root) -> tuple[str, ...]:
    path = root / "classes.txt"
    try:
        names = [line.strip() for line in read_bytes(os.fspath(path)).decode().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"data.data_dir: {path}: expected the names of the classes, one a line ({error}).") from error
    names = [name for name in names if name]
    if not 0 < len(names) <= IGNORED:
        raise ValueError(f"data.data_dir: {path}: has {len(names)} classes, expected 1 to {IGNORED}.")
    return tuple(names)
