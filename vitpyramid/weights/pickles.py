"""A pickle machine that can only rebuild tensors and plain values.

A pickle is a program, and Python's own machine runs whatever it names. This one has its own stack and executes the
instructions that PyTorch's files are made of; the names that it knows are in `_NAMES`, and what stands there describes
a tensor or holds a value. Any other name or instruction ends the reading. No instruction copies what another has made,
so the memory that a pickle takes is bounded by its length.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST = 2**22  # bytes of a pickle; tensors are not in it, real ones are below 1 MiB

# By PyTorch's name of a dtype.
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex128": np.dtype(np.complex128),
    "complex64": np.dtype(np.complex64),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
_MOST_DIMENSIONS = 32
_SCALARS = (str, int, float, bool, bytes, type(None))


class UnsafeFileError(ValueError):
    """A file that asks for something other than tensors and plain values."""


class Storage(NamedTuple):
    """Where the numbers of tensors lie: `numel` values of `dtype` from number `begin` of what is filed under `key`."""

    key: str
    dtype: np.dtype
    begin: int
    numel: int


class Tensor(NamedTuple):
    """A tensor to be: which values of a storage, read as `dtype`, are its elements. Strides count values."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert(dict):
    """Stands for an object whose contents do not matter, such as the command line of the run that saved the file."""


class _Named(NamedTuple):
    """A name that a pickle may call: what it gives for its arguments."""

    name: str
    make: Callable[..., Any]


def unpickle(stream, end: int, storages: dict[str, Storage]) -> Any:
    """Executes the pickle at the position of `stream`, a binary file, and leaves it behind it.

    Args:
      end: position in `stream` beyond which the pickle may not reach.
      storages: gets every storage that the pickle refers to, by key.

    Returns:
      Dicts, lists, tuples, sets, numbers, strings, `Tensor`s, `Inert`s. A container may be in several places.

    Raises:
      UnsafeFileError: a name or an instruction that this machine does not know.
      Exception: of many types, for damaged pickles.
    """
    machine = _Machine(storages)
    begin = stream.tell()
    for opcode, argument, position in pickletools.genops(stream):
        if position - begin > LARGEST or stream.tell() > end:
            raise ValueError(f"its pickle goes on beyond byte {min(begin + LARGEST, end)}")
        try:
            machine.execute(opcode.name, argument)
        except IndexError as error:
            raise ValueError(f"its pickle takes what is not there ({opcode.name} at byte {position})") from error
    return machine.stack.pop()


class _Machine:
    def __init__(self, storages: dict[str, Storage]):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def execute(self, name: str, argument: Any) -> None:
        """One instruction; the names are those of `pickletools`."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(argument)
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"its pickle refers to value {argument}, which there is not")
                stack.append(self.memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(name[-1]) :] = [tuple(self.last(int(name[-1])))]
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(self.pop_to_mark())
            case "APPEND":
                value = stack.pop()
                self.top(list).append(value)
            case "APPENDS":
                values = self.pop_to_mark()
                self.top(list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self.pop_to_mark()
                stack.append({})
                self.set_items(items)
            case "SETITEM":
                items = self.last(2)
                del stack[-2:]
                self.set_items(items)
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                values = self.pop_to_mark()
                self.top(set).update(_key(value) for value in values)
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self.last(2)
                stack[-2:] = [_named(module, attribute)]
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.last(2)
                if not isinstance(function, _Named) or type(arguments) is not tuple:
                    raise UnsafeFileError(f"it calls {type(function).__name__}, which is no name of a tensor; refused")
                stack[-2:] = [function.make(*arguments)]
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], dict):
                    raise UnsafeFileError(f"it sets attributes of {type(stack[-1]).__name__}; refused")
                if isinstance(stack[-1], Inert) and isinstance(state, dict):
                    stack[-1].update(state)  # an ordered dict's own attributes (`_metadata`) do not matter
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case _:
                raise UnsafeFileError(f"it has the pickle instruction {name}, which no file of tensors needs; refused")

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"its pickle fills a {type(self.stack[-1]).__name__} like a {kind.__name__}")
        return self.stack[-1]

    def last(self, count: int) -> list:
        if len(self.stack) < count:
            raise IndexError
        return self.stack[-count:]

    def pop_to_mark(self) -> list:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def storage(self, reference: Any) -> Storage:
        """The storage of a reference `("storage", type, key, device, numel, view)`; files before 1.6 may have views."""
        try:
            kind, dtype, key, _, numel, *view = reference
        except (TypeError, ValueError):
            kind = None
        if kind != "storage" or not isinstance(dtype, np.dtype) or not _is_count(numel):
            raise ValueError(f"its pickle refers to {str(reference)[:80]}, which is no storage")
        root = Storage(str(key), dtype, 0, numel)
        if self.storages.setdefault(root.key, root) != root:
            raise ValueError(f"storage {key} is described twice, differently")
        if not view or view[0] is None:
            return root
        _, begin, size = view[0]
        if not (_is_count(begin) and _is_count(size) and begin + size <= numel):
            raise ValueError(f"a view of storage {key} reaches beyond its {numel} values")
        return Storage(root.key, dtype, begin, size)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**60


def _key(key: Any) -> Any:
    """A dict's key or a set's member. Nested tuples are refused: hashing a small pickle of those can take for ever."""
    items = key if type(key) is tuple else (key,)
    if not all(isinstance(item, _SCALARS) for item in items):
        raise ValueError(f"its pickle has a {type(key).__name__} as a key")
    return key


def _rebuild(storage, offset, shape, strides, *_ignored) -> Tensor:
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_v3(storage, offset, shape, strides, _requires_grad, _hooks, dtype, *_ignored) -> Tensor:
    return _tensor(storage, dtype, offset, shape, strides)


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor without storage or dtype")
    shape, strides = _size(shape), _size(strides)
    if len(shape) != len(strides) or not all(_is_count(number) for number in (offset, *shape, *strides)):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    held = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if 0 not in shape and last >= held:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} reaches beyond the {held} values of its storage"
        )
    return Tensor(storage, dtype, offset, shape, strides)


def _unsupported(kind: str) -> Callable:
    def refuse(*_arguments):
        raise ValueError(f"it holds a {kind} tensor; expected plain ones")

    return refuse


def _named(module: Any, name: Any) -> Any:
    known = _NAMES.get((module, name))
    if known is None:
        raise UnsafeFileError(f"it names {module}.{name}, which is neither a tensor nor a plain value; refused")
    return known if isinstance(known, np.dtype) else _Named(name, known)


def _inert(*_arguments) -> Inert:
    return Inert()


def _size(shape: Any = ()) -> tuple:
    if not isinstance(shape, (tuple, list)) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a {type(shape).__name__} as a shape, expected at most {_MOST_DIMENSIONS} numbers")
    return tuple(shape)


def _ordered_dict(*arguments) -> dict:
    """Empty, or made of a list of pairs (Python 2), which is used up so that it cannot be copied again and again."""
    items = arguments[0] if arguments and isinstance(arguments[0], list) else []
    made = {_key(key): value for key, value in items}
    items.clear()
    return made


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_ignored: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_ignored: tensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _unsupported("sparse"),
    ("torch._utils", "_rebuild_qtensor"): _unsupported("quantised"),
    ("torch", "Size"): _size,
    ("torch", "device"): _inert,
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("torch", name): DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{("torch.cuda", name): DTYPES[dtype] for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): DTYPES["uint8"],
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): lambda *_ignored: {},
    ("collections", "Counter"): lambda counts=None: counts or {},
    # Values that training states carry beside their tensors.
    ("argparse", "Namespace"): _inert,
    ("yacs.config", "CfgNode"): _inert,
    ("numpy", "dtype"): _inert,
    ("_codecs", "encode"): _inert,  # the bytes of a numpy number; like everything here it only has the name
    ("numpy.core.multiarray", "scalar"): _inert,
    ("numpy._core.multiarray", "scalar"): _inert,
    ("pathlib", "PosixPath"): _inert,
    ("pathlib", "WindowsPath"): _inert,
}
