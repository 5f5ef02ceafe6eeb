"""The pickles of PyTorch's files, without running anything that is in them.

A pickle is a program. It is run by Python's own machine, in the form that is written in Python: the one in C makes room
for whatever is claimed, and hashes any key, before this module could look at it. Of its instructions those are left
that PyTorch's files are made of. Names stand for what is in `_NAMES`, which describes tensors, or for `Inert`; any
other one ends the reading. No instruction copies what others have made and their number is bounded, hence time and
memory are by the length of the pickle.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST = 2**22  # bytes of a pickle; tensors are not in it, real ones are below 1 MiB
_MOST_READS = 2**20  # an instruction is one or more; a tensor takes about 60
_MOST_ARGUMENTS = 32  # of a call; also dimensions of a tensor
_LARGEST_INTEGER = 2**60  # as a key or a size; hashes of integers below are all different (but for -1 and -2)
_LINE = 200  # characters of a file's text in a message

# By PyTorch's name of a dtype.
_NUMPY = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex128 complex64"
_ML = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
DTYPES = {dtype.name: dtype for dtype in map(np.dtype, (*_NUMPY.split(), *_ML))}
_KINDS = """
    Double:float64 Float:float32 Half:float16 BFloat16:bfloat16 Long:int64 Int:int32 Short:int16 Char:int8 Byte:uint8
    Bool:bool ComplexDouble:complex128 ComplexFloat:complex64 Untyped:uint8
"""
_STORAGES = {f"{kind}Storage": DTYPES[name] for kind, name in (pair.split(":") for pair in _KINDS.split())}
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET MEMOIZE BINPUT LONG_BINPUT BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class UnsafeFileError(ValueError):
    """A file that asks for something other than tensors and plain values."""


class Storage(NamedTuple):
    """Numbers that tensors are of; `held` is None while only sizes are collected."""

    dtype: np.dtype
    held: memoryview | None


class Inert(dict):
    """Stands for an object whose contents do not matter: a set, the command line of the run that saved the file."""

    def __init__(self, *_ignored):
        super().__init__()

    def add(self, value: Any) -> None:
        """Takes what the pickle fills the object with, and forgets it."""

    append = extend = add


GetStorage = Callable[[str, np.dtype, int], memoryview | None]


def unpickle(data: memoryview, storage: GetStorage, most: int) -> tuple[Any, int]:
    """Reads the pickle at the beginning of `data`.

    Args:
      storage: gives the bytes of a storage, by key, dtype and number of values. None: its tensors are None too.
      most: bytes that all tensors together may take. Strides of 0 can claim anything.

    Returns:
      Dicts, lists, tuples, numbers, strings, numpy arrays that are views of storages, `Inert`s; and the pickle's
      length. Items under keys other than strings and integers below 2**60 are left out: hashing nested tuples can take
      for ever. A container may be in several places, and within itself.

    Raises:
      UnsafeFileError: a name or an instruction that no file of tensors needs.
      Exception: of many types, for damaged pickles.
    """
    source = _Source(data)
    return _Machine(source, storage, most).load(), source.tell()


def brief(text: str) -> str:
    """What a file says, for a message: one line, without control characters."""
    shown = repr(text[: _LINE + 1])[1:-1]
    return f"{shown[:_LINE]}..." if len(shown) > _LINE else shown


class _Source(io.BytesIO):
    """The bytes of a pickle."""

    def __init__(self, data: memoryview):
        super().__init__(data[:LARGEST])
        self._reads = 0

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        found = super().read(size)
        if len(found) < size:
            raise ValueError(f"its pickle ends early, or goes on beyond {LARGEST} bytes")
        if self._reads > _MOST_READS:
            raise ValueError(f"its pickle goes on beyond {_MOST_READS} instructions")
        return found


class _Instructions(dict):
    def __missing__(self, code: int) -> None:
        name = next((opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), hex(code))
        raise UnsafeFileError(f"it has the pickle instruction {name}, which no file of tensors needs; refused")


class _Machine(pickle._Unpickler):
    """Methods are those of the instructions' names; those that are not here are as harmless as they stand."""

    def __init__(self, source: _Source, storage: GetStorage, most: int):
        super().__init__(source, encoding="latin-1")  # Python 2's strings
        self._storage, self._left = storage, most

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module, name))
        if known is None and not _INERT.fullmatch(f"{module} {name}"):
            raise UnsafeFileError(
                f"it names {brief(f'{module}.{name}')}, which is neither a tensor nor a plain value; refused. "
                "If it holds a whole model, save the model's state_dict() instead"
            )
        return Inert if known is None else known

    def persistent_load(self, reference: Any) -> Storage:
        """`("storage", type, key, device, numel, view)`; files before 1.6 may have views."""
        if type(reference) is not tuple or len(reference) not in (5, 6):
            raise ValueError(f"its pickle refers to a {type(reference).__name__}, which is no storage")
        kind, dtype, key, _, numel, *view = reference
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or not _is_count(numel):
            raise ValueError("its pickle refers to what is no storage")
        held = self._storage(key, dtype, numel)
        if held is not None and view and view[0] is not None:
            _, begin, size = view[0]
            if not (_is_count(begin) and _is_count(size) and begin + size <= numel):
                raise ValueError(f"a view of storage {key} reaches beyond its {numel} values")
            held = held[begin * dtype.itemsize : (begin + size) * dtype.itemsize]
        return Storage(dtype, held)

    def load_frame(self) -> None:
        self.read(8)  # a frame's length is for readers of streams

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
            raise UnsafeFileError(f"it calls {type(function).__name__}, which is no name of a tensor; refused")
        made = function(*arguments)
        if isinstance(made, np.ndarray):
            self._left -= made.nbytes
            if self._left < 0:
                raise ValueError(f"a tensor of shape {made.shape}: with it they take more than the file can hold")
        self.append(made)

    load_newobj = load_reduce

    def load_build(self) -> None:
        self.stack.pop()  # an object's own attributes (an ordered dict's `_metadata`) do not matter
        if not isinstance(self.stack[-1], dict):
            raise UnsafeFileError(f"it sets attributes of {type(self.stack[-1]).__name__}; refused")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_empty_set(self) -> None:
        self.append(Inert())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())


_STANDARD = pickle._Unpickler.dispatch
_CODES = [getattr(pickle, name)[0] for name in _INSTRUCTIONS.split()]
_Machine.dispatch = _Instructions({code: getattr(_Machine, _STANDARD[code].__name__) for code in _CODES})


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < _LARGEST_INTEGER


def _set_items(target: Any, items: Iterable[tuple[Any, Any]]) -> None:
    if not isinstance(target, dict):
        raise ValueError(f"its pickle fills a {type(target).__name__} like a dict")
    for key, value in items:
        if type(key) is str or (type(key) is int and -_LARGEST_INTEGER < key < _LARGEST_INTEGER):
            target[key] = value


def _rebuild(storage, offset, shape, strides, *_ignored) -> np.ndarray | None:
    return _array(storage, storage.dtype, offset, shape, strides)


def _rebuild_v3(storage, offset, shape, strides, _requires_grad, _hooks, dtype, *_ignored) -> np.ndarray | None:
    return _array(storage, dtype, offset, shape, strides)


def _array(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray | None:
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype) or not _is_count(offset):
        raise ValueError("a tensor without storage, dtype or offset")
    shape, strides = _size(shape), _size(strides)
    if storage.held is None:
        return None
    try:
        in_bytes = [stride * dtype.itemsize for stride in strides]
        return np.ndarray(shape, dtype, storage.held if 0 not in shape else None, offset * dtype.itemsize, in_bytes)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches beyond its storage"
        ) from error


def _size(shape: Any = ()) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)) or len(shape) > _MOST_ARGUMENTS or not all(map(_is_count, shape)):
        raise ValueError(f"a {type(shape).__name__} as a shape, expected at most {_MOST_ARGUMENTS} sizes")
    return tuple(shape)


def _ordered_dict(items: Any = (), *_ignored) -> dict:
    """Empty, or made of a list of pairs (Python 2), which is used up so that it cannot be copied again and again."""
    made = {}
    if isinstance(items, list):
        _set_items(made, items)
        items.clear()
    return made


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_ignored: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_ignored: tensor,
    ("torch", "Size"): _size,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): DTYPES["uint8"],
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda *_ignored: {},
    ("collections", "Counter"): lambda counts=None: counts or {},
}
# Values that training states carry beside their tensors, as "module name".
_INERT = re.compile(
    r"torch (device|strided|Generator)|torch\.serialization _get_layout|argparse Namespace|types SimpleNamespace"
    r"|(builtins|__builtin__) (set|frozenset|dict|list|tuple|int|float|complex|str|bool|bytearray|slice|x?range)"
    r"|collections deque|datetime \w+|pathlib \w+|decimal Decimal|fractions Fraction|_codecs encode"
    r"|numpy (dtype|ndarray)|numpy\._?core\.multiarray (_reconstruct|scalar)|numpy\.random\.\w+ \w+"
    r"|(addict|easydict|lightning|lightning_fabric|mmcv|mmengine|omegaconf|pytorch_lightning|yacs)(\.\w+)+ \w+"
    r"|easydict EasyDict"
)
