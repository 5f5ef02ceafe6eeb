"""Small files that were written to take for ever, to fill the memory, or to write on the terminal."""

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import golden
from test_reader import legacy, storage, tensor, zipped
from vitpyramid.weights import read_torch_file
from vitpyramid.weights.pickles import LARGEST

# Reads files in a process that may take 10 s and 256 MB for each.
LIMITED = """
import pathlib, resource, signal, sys
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.importer import import_weights
from vitpyramid.weights.reader import read_torch_file
held = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 2**28, held + 2**28))
for path in sys.argv[1:]:
    signal.alarm(10)
    print(pathlib.Path(path).name, flush=True)
    try:
        import_weights(open_contents(read_torch_file(path)))
    except ValueError as error:
        assert len(str(error)) < 500 + len(path), len(str(error))
        assert str(error).isprintable(), error
    else:
        raise AssertionError("expected an error")
"""


def value(thing) -> bytes:
    """Instructions that leave a thing on the stack."""
    return pickle.dumps(thing, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


# Leaves a tuple of tuples that stands for 2**60 values; `SHARED` puts it there again.
NESTED = b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"q\x3c"
SHARED = b"h\x3c"
REBUILD, NAMESPACE = name("torch._utils", "_rebuild_tensor_v2"), name("argparse", "Namespace")
REFERENCE = [b"X\x07\0\0\0storage", name("torch", "FloatStorage"), value("0"), value("cpu"), value(6)]
NUMBERS = [storage(6), value(0), value((6,)), value((1,)), b"\x89", b"N"]


def replaced(parts: list[bytes], i: int, part: bytes = SHARED) -> bytes:
    return b"(" + b"".join([*parts[:i], part, *parts[i + 1 :]]) + b"t"


def pickles() -> dict[str, bytes]:
    """By what is done."""
    nested = {
        "value": SHARED,
        "key": b"}" + SHARED + b"Ns",
        "keys": b"}(" + SHARED + b"Nu",
        "key of pairs": name("collections", "OrderedDict") + b"]]" + SHARED + b"aNaa\x85R",
        "member": b"\x8f(" + SHARED + b"\x90",
        "frozen member": b"(" + SHARED + b"\x91",
        "member of a list": name("__builtin__", "set") + b"]" + SHARED + b"a\x85R",
        "counts": name("collections", "Counter") + SHARED + b"\x85R",
        "size": name("torch", "Size") + SHARED + b"\x85R",
        "sizes": name("torch", "Size") + b"(" + SHARED + b"1t\x85R",
        "name": SHARED + SHARED + b"\x93",
        "called": SHARED + b")R",
        "arguments": REBUILD + SHARED + b"R",
        "state": SHARED + SHARED + b"b",
        "list": SHARED + b"Na",
        "reference": SHARED + b"Q",
        "view": b"(" + b"".join(REFERENCE) + SHARED + b"tQ",
        **{f"reference {i}": replaced(REFERENCE, i) + b"Q" for i in range(5)},
        **{f"tensor {i}": REBUILD + replaced(NUMBERS, i) + b"R" for i in range(6)},
        **{f"tensor of {i}": REBUILD + replaced(NUMBERS, i, b"(" + SHARED + b"t") + b"R" for i in (2, 3)},
    }
    many = b"(" + b"N" * 200_000 + b"t"
    called = {
        "build": (b"}(" + b"".join(value(i) for i in range(20_000)) + b"u", NAMESPACE + b")Rh\1b"),
        "update": (
            b"}(" + b"".join(value(i) for i in range(20_000)) + b"u",
            name("collections", "Counter") + b"h\1\x85R",
        ),
        "size": (b"(" + b"N" * 200_000 + b"t", name("torch", "Size") + b"h\1\x85R"),
        "set": (b"](" + b"N" * 200_000 + b"e", name("builtins", "set") + b"h\1\x85R"),
        "pairs": (b"](" + b"]" * 200_000 + b"e", name("collections", "OrderedDict") + b"h\1\x85R"),
        "arguments": (many, REBUILD + b"h\1R"),
        "inert arguments": (many, NAMESPACE + b"h\1R"),
        "reference": (many, b"h\1Q"),
        "integer": (b"\x8b\xff\xff\x0f\0" + b"\1" * 0xFFFFF, b"}h\1Ns"),
        "strides": (many, REBUILD + b"(" + b"".join(NUMBERS[:2]) + b"h\1h\1\x89NtR"),
    }
    for what, (made, use) in called.items():
        called[what] = b"(" + made + b"q\1" + use * 20_000 + b"t"
    numbers = b"".join(value(i * (2**61 - 1)) + b"N" for i in range(30_000))
    lengths = {"X": "<I", "T": "<I", "B": "<I", "\x8b": "<I", "\x8d": "<Q", "\x8e": "<Q", "\x95": "<Q", "r": "<I"}
    return {
        **{f"nested {what}": NESTED + content + b"." for what, content in nested.items()},
        **{f"called {what}": b"\x80\x02" + content + b"." for what, content in called.items()},
        **{f"one instruction {code}": b"\x80\x02" + code * (LARGEST - 3) + b"." for code in (b"(", b"}", b"\x8f")},
        **{
            f"length {ord(code)}": b"\x80\x02N" + code.encode("latin-1") + struct.pack(size, 2**31 - 1) + b"."
            for code, size in lengths.items()
        },
        "colliding integers": b"\x80\x02}(" + numbers + b"u.",
        "colliding integers one by one": b"\x80\x02}" + numbers.replace(b"N", b"Ns") + b".",
        "within itself": b"\x80\x02}q\0X\x05\0\0\0modelh\0sX\3\0\0\0neth\0s.",
        "deep": b"\x80\x02)" + b"\x85" * 10**6 + b".",
        "long name": b"\x80\x02c" + b"\x1b[31m" * 10**5 + b"\nx\n.",
        "long key": b"\x80\x02}" + value("\x1b[31m\n" * 10**5) + tensor(6, (6,), (1,))[2:-1] + b"s.",
        "long keys": b"\x80\x02}" + value("\x1b[31m\n" * 10**5) + b"]s.",
        "long storage": b"\x80\x02" + replaced(REFERENCE, 2, value("\x1b\n" * 10**5)) + b"Q.",
        "large sides": b"\x80\x02}("
        + value("tokens_to_token.project.weight") + tensor(6, (6,), (1,))[2:-1]
        + value("pos_embed") + tensor(6, (1, 1 + 500**2, 1), (0, 0, 0))[2:-1] + b"u.",
        "many large tensors": b"\x80\x02(" + tensor(6, (2**17,), (0,))[2:-1] * 1000 + b"t.",
    }  # fmt: skip


def overlapping(path):
    """An archive of one megabyte that is in it a thousand times, each time to be read for its checksum."""
    references = b"".join(tensor(2**20, (1,), (1,))[2:-1].replace(value("0"), value(str(i))) for i in range(1000))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02(" + references + b"t.")
        archive.writestr("archive/data/0", bytes(2**22))
        for i in range(1, 1000):
            info = copy.copy(archive.getinfo("archive/data/0"))
            info.filename = f"archive/data/{i}"
            archive.filelist.append(info)
    return path


def sparse(path):
    """Six gigabytes that take no space, as one string of the third pickle."""
    legacy(path, b"")
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(b"}"))
        file.write(b"\x8e" + struct.pack("<Q", 6 * 2**30))
    os.truncate(path, 6 * 2**30 + 2**12)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_small_files_take_little_time_and_memory(tmp_path):
    six = np.arange(6, dtype=np.float32).tobytes()
    files = [overlapping(tmp_path / "overlapping"), sparse(tmp_path / "sparse")]
    for what, content in pickles().items():
        files.append(zipped(tmp_path / f"zip, {what}", content, six))
        if len(content) < 1000:
            files.append(legacy(tmp_path / f"legacy, {what}", content, six))
    keys = tmp_path / "legacy, nested keys"
    keys.write_bytes(
        legacy(keys, tensor(6, (6,), (1,))).read_bytes().split(value(["0"]))[0] + b"]" + NESTED[2:] + b"a."
    )
    index = tmp_path / "deep.index.json"
    index.write_text("[" * 10**6)
    assert all(file.stat().st_size < 2 * LARGEST for file in files if file.name != "sparse")
    command = [sys.executable, "-c", LIMITED, *map(str, [*files, keys, index])]
    done = subprocess.run(command, cwd=golden.FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()[-5:]


def test_the_nested_values_would_take_for_ever():
    """That is, Python's own machine hashes all of them."""
    program = f"import pickle; pickle.loads({NESTED + b'}' + SHARED + b'Ns.'!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", program], timeout=1, check=False)


def test_keys_that_are_neither_strings_nor_small_integers_are_left_out(tmp_path):
    content = {"a": 1, -3: 2, 2**47: 3, 2**60: 4, (1, 2): 5, 0.5: 6, None: 7, b"b": 8}
    found = read_torch_file(zipped(tmp_path / "a", pickle.dumps(content, 4)))
    assert found == {"a": 1, -3: 2, 2**47: 3}


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"^{path}: expected a file of weights, this is a folder, pipe or device"):
            read_torch_file(path)


@pytest.mark.parametrize("file", ["../a", "/etc/passwd", "", ["a"], "..", "a.index.json"])
def test_parts_of_an_index_lie_beside_it(tmp_path, file):
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        read_torch_file(tmp_path / "a.index.json")
