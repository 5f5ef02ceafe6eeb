"""Reads files of `torch.save` and safetensors, without PyTorch, and without running anything that is in them.

Files are mapped, not read: an array is a view of the file. Every size that a file claims is compared with what it has
before anything is made of it.
"""

import json
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vitpyramid.weights.pickles import DTYPES, Storage, Tensor, UnsafeFileError, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_EXPANSION = 64  # times the file's size that one tensor may take: strides of 0 can claim anything
_DEEPEST = 100  # containers in containers
_SAFETENSORS_DTYPES = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": DTYPES["int64"],
    "I32": DTYPES["int32"],
    "I16": DTYPES["int16"],
    "I8": DTYPES["int8"],
    "U64": DTYPES["uint64"],
    "U32": DTYPES["uint32"],
    "U16": DTYPES["uint16"],
    "U8": DTYPES["uint8"],
    "BOOL": DTYPES["bool"],
    "C64": DTYPES["complex64"],
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
        the name.

    Returns:
      The object: mostly nested dicts. Arrays are read-only views of the file, which stays mapped while they live, and
      of one another as the tensors were; dtypes are the tensors' (bfloat16 as `ml_dtypes.bfloat16`). What is neither
      a tensor nor a plain value, where it is known to be harmless, is a dict, mostly empty.

    Raises:
      UnsafeFileError: its pickle names anything but tensors and plain values; nothing of it was run.
      ValueError: no such format, truncated, corrupt, of another byte order, or claiming sizes that it does not have.
      OSError: no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise ValueError(f"{path}: expected a PyTorch or safetensors file, this one is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        if head.startswith(b"PK"):
            return _read_zip(path, data)
        if head[8:9] == b"{":
            return _read_safetensors(path, data)
        if head[:1] == b"\x80":
            return _read_legacy(data)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from error
    except MemoryError:
        raise
    # Broad: damaged pickles and archives raise anything, and all of it means the same to who reads the message.
    except Exception as error:
        raise ValueError(f"{path}: damaged or not a PyTorch file: {error or type(error).__name__}") from error
    what = next((what for start, what in _MISTAKEN if head.lstrip().startswith(start)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive (PyTorch before 0.1.10 wrote those; newer versions of it can convert them)"
    raise ValueError(
        f"{path}: expected a PyTorch file (zip or pickle) or safetensors; it is {what or f'none: {head[:8]!r} ...'}"
    )


def _read_safetensors(path: Path, data: mmap.mmap) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, "np"):
        pass  # the library has checked the header: names, dtypes, shapes, offsets, the file's size
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    values = memoryview(data)[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(values[begin:end], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    """The format since PyTorch 1.6: an archive of one pickle and an uncompressed file a storage."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("a zip archive with several files of one name")
    if "constants.pkl" in entries:
        raise ValueError("a TorchScript archive; expected a state dict saved with torch.save")
    if "data.pkl" not in entries:
        raise ValueError("a zip archive without data.pkl")
    if "byteorder" in entries:
        order = bytes(_entry(data, entries["byteorder"]))
        if order != b"little":
            raise ValueError(f"byte order {order!r}, expected b'little'")
    storages: dict[str, Storage] = {}
    pickle = _entry(data, entries["data.pkl"])
    data.seek(_begin(data, entries["data.pkl"]))
    content = unpickle(data, data.tell() + len(pickle), storages)
    values = {}
    for key, storage in storages.items():
        if f"data/{key}" not in entries:
            raise ValueError(f"its storage {key} is missing")
        held = _entry(data, entries[f"data/{key}"])
        if len(held) != storage.numel * storage.dtype.itemsize:
            raise ValueError(f"storage {key} has {len(held)} bytes, expected {storage.numel} values of {storage.dtype}")
        values[key] = held
    return _Arrays(values, len(data)).convert(content)


def _begin(data: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's file begin: behind its own header, whose length the directory does not know."""
    header = data[info.header_offset : info.header_offset + 30]
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    if header[:4] != b"PK\3\4":
        raise ValueError(f"{info.filename} is not where the archive's directory says")
    return info.header_offset + 30 + name_length + extra_length


def _entry(data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an archive's file, where they lie."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save does not do")
    begin = _begin(data, info)
    if begin + info.file_size > len(data):
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    held = memoryview(data)[begin : begin + info.file_size]
    # PyTorch writes 0 where it was told not to compute checksums.
    if info.CRC and zlib.crc32(held) != info.CRC:
        raise ValueError(f"the checksum of {info.filename} is wrong")
    return held


def _read_legacy(data: mmap.mmap) -> Any:
    """The format before PyTorch 1.6: four pickles (magic number, version, system, content), keys, then the storages."""
    storages: dict[str, Storage] = {}

    def load() -> Any:
        return unpickle(data, len(data), storages)

    if load() != _LEGACY_MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    load()
    system = load()
    if not system["little_endian"]:
        raise ValueError("big-endian byte order, expected little-endian")
    content, keys = load(), load()
    values, position = {}, data.tell()
    for key in keys:
        storage = storages[key]
        size = storage.numel * storage.dtype.itemsize
        if position + 8 + size > len(data):
            raise ValueError(f"storage {key} ends early, expected {storage.numel} values of {storage.dtype}")
        (numel,) = struct.unpack("<q", data[position : position + 8])
        if numel != storage.numel:
            raise ValueError(f"storage {key} has {numel} values, expected {storage.numel}")
        values[key] = memoryview(data)[position + 8 : position + 8 + size]
        position += 8 + size
    return _Arrays(values, len(data)).convert(content)


class _Arrays:
    """Puts arrays in place of `Tensor`s, once for each object however often it is referred to."""

    def __init__(self, values: dict[str, memoryview], file_size: int):
        self._values = values
        self._most = max(_LARGEST_EXPANSION * file_size, 2**20)
        self._done: dict[int, Any] = {}

    def convert(self, value: Any, depth: int = 0) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"containers nested more than {_DEEPEST} deep, or within themselves")
        if not isinstance(value, (dict, list, tuple, set)):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._convert(value, depth)
        return self._done[id(value)]

    def _convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._array(value)
        if isinstance(value, Storage):
            raise ValueError("it holds a storage outside of a tensor")
        if isinstance(value, dict):
            return {key: self.convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(self.convert(item, depth + 1) for item in value)
        return value

    def _array(self, tensor: Tensor) -> np.ndarray:
        storage, itemsize = tensor.storage, tensor.dtype.itemsize
        size = itemsize
        for length in tensor.shape:
            size *= length
        if size > self._most:
            raise ValueError(f"a tensor of shape {tensor.shape} would take {size} bytes, more than the file can hold")
        if storage.key not in self._values:
            raise ValueError(f"its storage {storage.key} is missing")
        if not size:
            return np.zeros(tensor.shape, tensor.dtype)
        begin = storage.begin * storage.dtype.itemsize + tensor.offset * itemsize
        end = (storage.begin + storage.numel) * storage.dtype.itemsize
        held = self._values[storage.key][begin:end]
        values = np.frombuffer(held, tensor.dtype, len(held) // itemsize)
        strides = tuple(stride * itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
