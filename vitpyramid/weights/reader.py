"""Reads files of `torch.save` and safetensors, without PyTorch, and without running anything that is in them.

Files are mapped, not read: an array is a view of the file. Every size that a file claims is compared with what it has
before anything is made of it.
"""

import functools
import json
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitpyramid.weights.pickles import DTYPES, UnsafeFileError, brief, unpickle

INDEX = ".index.json"  # behind the name of weights that Hugging Face's libraries have divided among several files
_LARGEST_INDEX = 2**24  # bytes
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_EXPANSION = 64  # times the file's size that its tensors may take: strides of 0 can claim anything
_ODD_NAMES = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SAFETENSORS_DTYPES = {  # float32 is F32, and so on
    _ODD_NAMES.get(name) or name[0].upper() + name.lstrip("abcdefghijklmnopqrstuvwxyz"): dtype
    for name, dtype in DTYPES.items()
}
# Files that are found under the names of weights.
_MISTAKEN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<", "a page of HTML or XML"),
    (b"\x89HDF", "an HDF5 file"),
)


def read_torch_file(path: str | Path) -> Any:
    """What a file of `torch.save` or safetensors holds, with numpy arrays in place of tensors.

    Args:
      path: `.pth`, `.pt`, `.bin`, `.pth.tar` (zip format or the older one) or `.safetensors`; the content decides, not
        the name. Or Hugging Face's index of several such files, `*.index.json`, which lie beside it.

    Returns:
      The object: mostly nested dicts. Arrays are read-only views of the file, which stays mapped while they live, and
      of one another as the tensors were; dtypes are the tensors' (bfloat16 as `ml_dtypes.bfloat16`). What is neither
      a tensor nor a plain value, where it is known to be harmless, is a dict, mostly empty; items of dicts under keys
      other than strings and integers are left out.

    Raises:
      UnsafeFileError: its pickle names anything but tensors and plain values; nothing of it was run.
      ValueError: no file, no such format, truncated, corrupt, of another byte order, or claiming sizes that it does not
        have.
      OSError: nothing there.
    """
    path, content = Path(path), {}
    if not path.name.endswith(INDEX):
        return _read(path)
    for part in parts(path):
        tensors = _read(part)
        if not isinstance(tensors, dict):
            raise ValueError(f"{part}: expected a state dict, it holds a {type(tensors).__name__}")
        content |= tensors
    return content


def parts(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
      ValueError: it is no such index, or names files that are not beside it.
    """
    with _open(index) as file:
        text = file.read(_LARGEST_INDEX)
    try:
        files = sorted(set(json.loads(text)["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError("a file of another folder")
        return [index.with_name(file) for file in files]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: expected an index of safetensors or PyTorch files: {brief(str(error))}") from error


def _open(path: Path) -> BinaryIO:
    """A pipe would be waited for, and a device read, for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, this is a folder, pipe or device")
    return path.open("rb")


def _read(path: Path) -> Any:
    with _open(path) as file:
        head = file.read(512)
        if not head:
            raise ValueError(f"{path}: expected a PyTorch or safetensors file, this one is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            if head.startswith(b"PK"):
                return _read_zip(file, memoryview(data))
            if head[8:9] == b"{":
                return _read_safetensors(path, memoryview(data))
            if head[:1] == b"\x80":
                return _read_legacy(memoryview(data))
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{path}: {error}") from error
        except MemoryError:
            raise
        # Broad: damaged pickles and archives raise anything, and all of it means the same to who reads the message.
        except Exception as error:
            what = brief(str(error)) or type(error).__name__
            raise ValueError(f"{path}: damaged or not a PyTorch file: {what}") from error
    what = next((what for start, what in _MISTAKEN if head.lstrip().startswith(start)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive (PyTorch before 0.1.10 wrote those; newer versions of it can convert them)"
    raise ValueError(
        f"{path}: expected a PyTorch file (zip or pickle) or safetensors; it is {what or f'none: {head[:8]!r} ...'}"
    )


def _read_safetensors(path: Path, data: memoryview) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, "np"):
        pass  # the library has checked the header: names, dtypes, shapes, offsets, the file's size
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    values = data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(values[begin:end], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _read_zip(file: BinaryIO, data: memoryview) -> Any:
    """The format since PyTorch 1.6: an archive of one pickle and an uncompressed file a storage."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if len(entries) < len(infos) or sum(info.file_size for info in infos) > len(data):
        raise ValueError("a zip archive with several files of one name, or in one place")
    if "constants.pkl" in entries:
        raise ValueError("a TorchScript archive; expected a state dict saved with torch.save")
    if "data.pkl" not in entries:
        raise ValueError("a zip archive without data.pkl")
    if "byteorder" in entries:
        order = bytes(_entry(data, entries["byteorder"]))
        if order != b"little":
            raise ValueError(f"byte order {order!r}, expected b'little'")

    @functools.cache
    def storage(key: str, dtype: np.dtype, numel: int) -> memoryview:
        if f"data/{key}" not in entries:
            raise ValueError(f"its storage {key} is missing")
        held = _entry(data, entries[f"data/{key}"])
        if len(held) != numel * dtype.itemsize:
            raise ValueError(f"storage {key} has {len(held)} bytes, expected {numel} values of {dtype}")
        return held

    return unpickle(_entry(data, entries["data.pkl"]), storage, _most(data))[0]


def _most(data: memoryview) -> int:
    return max(_LARGEST_EXPANSION * len(data), 2**20)


def _entry(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an archive's file, where they lie: behind its own header, whose length the directory has not."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save does not do")
    signature, name_length, extra_length = struct.unpack_from("<4s22xHH", data, info.header_offset)
    begin = info.header_offset + 30 + name_length + extra_length
    held = data[begin : begin + info.file_size]
    if signature != b"PK\3\4" or len(held) < info.file_size:
        raise ValueError(f"{info.filename} is not where the archive's directory says")
    # PyTorch writes 0 where it was told not to compute checksums.
    if info.CRC and zlib.crc32(held) != info.CRC:
        raise ValueError(f"the checksum of {info.filename} is wrong")
    return held


def _read_legacy(data: memoryview) -> Any:
    """The format before PyTorch 1.6: four pickles (magic number, version, system, content), keys, then the storages.

    The content is read twice: what comes behind it says where its storages are.
    """
    described: dict[str, tuple[np.dtype, int]] = {}
    values: dict[str, memoryview] = {}
    position = 0

    def describe(key: str, *what: Any) -> None:
        if described.setdefault(key, what) != what:
            raise ValueError(f"storage {key} is described twice, differently")

    def storage(key: str, _dtype: np.dtype, _numel: int) -> memoryview:
        if key not in values:
            raise ValueError(f"its storage {key} is missing")
        return values[key]

    def load(storage=describe) -> Any:
        nonlocal position
        value, length = unpickle(data[position:], storage, _most(data))
        position += length
        return value

    if load() != _LEGACY_MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    load()
    if not load()["little_endian"]:
        raise ValueError("big-endian byte order, expected little-endian")
    begin = position
    load()
    for key in load():
        if type(key) is not str or key not in described:
            raise ValueError("its list of storages has others than its tensors")
        dtype, numel = described[key]
        (found,) = struct.unpack_from("<q", data, position)
        values[key] = data[position + 8 : position + 8 + numel * dtype.itemsize]
        if found != numel or len(values[key]) < numel * dtype.itemsize:
            raise ValueError(f"storage {key} ends early or has {found} values, expected {numel} of {dtype}")
        position += 8 + len(values[key])
    position = begin
    return load(storage)
