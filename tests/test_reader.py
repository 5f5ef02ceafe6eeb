"""Files that PyTorch wrote, files that somebody wrote to do harm, and damaged ones."""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import golden
from vitpyramid.weights import UnsafeFileError, read_torch_file

FILES = golden.FOLDER / "torch_files"
MAGIC = 0x1950A86A20F9469CFC6C


def expected_tensors() -> dict:
    """What `make_torch_files.py` saved."""
    base = np.arange(24, dtype=np.float32)
    numbers = (np.arange(6) % 5 - 2).reshape(2, 3)
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
    made = {name: numbers.astype(name) for name in names}
    return made | {
        "bfloat16": numbers.astype(ml_dtypes.bfloat16),
        "base": base,
        "shared": base[4:10].reshape(2, 3),
        "transposed": base.reshape(4, 6).T,
        "strided": base[1::5],
        "expanded": np.full((3, 4), 3, np.float32),
        "empty": np.zeros((0, 5), np.float32),
        "scalar": np.array(2.5, np.float32),
        "parameter": np.ones(2, np.float32),
    }


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray), name
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_tensors_of_both_formats(name):
    found = read_torch_file(FILES / name)
    assert_same(found, expected_tensors())
    assert np.shares_memory(found["base"], found["shared"])
    with pytest.raises(ValueError, match="read-only"):
        found["base"][0] = 1


def test_a_training_state():
    found = read_torch_file(FILES / "training.pth.tar")
    assert_same(found["state_dict"], expected_tensors())
    assert found["epoch"] == 3
    assert found["size"] == (2, 3)
    assert found["args"] == {}
    assert found["optimizer"]["state"][0]["step"] == 1


def test_rare_dtypes_missing_checksums_and_views_of_storages():
    found = read_torch_file(FILES / "float8.pth")
    assert_same(
        found,
        {"float8": np.array([0.5, -2], ml_dtypes.float8_e4m3fn), "uint16": np.array([7, 65535], np.uint16)},
    )
    assert_same(read_torch_file(FILES / "no_checksums.pth"), {"a": np.arange(3, dtype=np.float32)})
    views = read_torch_file(FILES / "legacy_views.pth")
    assert_same(views, {"low": np.array([1, 2, 3], np.float32), "high": np.array([5, 6, 7], np.float32)})


def test_safetensors(tmp_path):
    arrays = {name: np.ascontiguousarray(array) for name, array in expected_tensors().items() if name != "bfloat16"}
    save_file(arrays, tmp_path / "weights.bin", metadata={"format": "pt"})  # the content decides, not the name
    assert_same(read_torch_file(tmp_path / "weights.bin"), arrays)
    values = np.arange(-2, 4).astype(ml_dtypes.bfloat16)
    header = b'{"x":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}      '
    (tmp_path / "half").write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    assert_same(read_torch_file(tmp_path / "half"), {"x": values.reshape(2, 3)})
    for damage in (header.replace(b"[0,12]", b"[0,99]"), header.replace(b"[2,3]", b"[2,9]"), header.replace(b"}", b"")):
        (tmp_path / "half").write_bytes(struct.pack("<Q", len(damage)) + damage + values.tobytes())
        with pytest.raises(ValueError, match="half: damaged"):
            read_torch_file(tmp_path / "half")


def zipped(path, content: bytes, data: bytes = b"", compression=zipfile.ZIP_STORED, **more):
    """An archive as `torch.save` writes it, with this pickle and one storage called 0."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, entry in {"data.pkl": content, "data/0": data, "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", entry)
    return path


def legacy(path, content: bytes, data: bytes = b""):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, system)]
    keys = pickle.dumps(["0"], 2) + struct.pack("<q", len(data) // 4) + data
    path.write_bytes(b"".join(parts) + content + keys)
    return path


def storage(numel: int, kind: bytes = b"FloatStorage") -> bytes:
    """Instructions that leave a storage called 0 on the stack."""
    number = pickle.dumps(numel, 2)[2:-1]
    return b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"tQ"


def tensor(numel: int, shape: tuple, strides: tuple, offset: int = 0, kind: bytes = b"FloatStorage") -> bytes:
    numbers = [pickle.dumps(value, 2)[2:-1] for value in (offset, shape, strides)]
    arguments = b"(" + storage(numel, kind) + b"".join(numbers) + b"\x89Nt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def test_the_writers_of_this_test_write_what_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32)
    content = tensor(6, (3, 2), (1, 3))
    for path in (zipped(tmp_path / "a", content, values.tobytes()), legacy(tmp_path / "b", content, values.tobytes())):
        np.testing.assert_array_equal(read_torch_file(path), values.reshape(2, 3).T)


class Call:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker: str) -> dict[str, bytes]:
    """By the name that the error must have: pickles that would leave a file behind, or do other harm."""
    touch = f"open({marker!r}, 'w').close()"
    system = "posix.system"
    made = {
        system: pickle.dumps(Call(os.system, f"touch {marker}"), 2),
        "builtins.exec": pickle.dumps(Call(exec, touch), 4),
        "builtins.eval": pickle.dumps({"a": [Call(eval, touch)]}, 2, fix_imports=False),
        "builtins.getattr": pickle.dumps(Call(getattr, "x", "upper"), 4),
        "subprocess.Popen": pickle.dumps(Call(subprocess.Popen, ["touch", marker]), 4),
        "torch.load": b"\x80\x02ctorch\nload\nX\x01\0\0\0x\x85R.",
        "torch.hub.load": b"\x80\x02ctorch.hub\nload\nX\x01\0\0\0x\x85R.",
        "_rebuild_sparse_tensor, which is neither a tensor": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.",
        "numpy.testing._private.utils.runstring": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n)R.",
        "torch._utils.os.system": b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93.",
        "collections.OrderedDict.__init__": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "EXT1": b"\x80\x02\x82\x01.",
        "INST": b"\x80\x02(" + pickle.dumps(f"touch {marker}", 2)[2:-1] + b"ios\nsystem\n.",
        "OBJ": b"\x80\x02(cargparse\nNamespace\no.",
        "NEWOBJ_EX": b"\x80\x04)}\x92.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "PERSID": b"\x80\x02P0\n.",
        "it calls str": b"\x80\x02X\x01\0\0\0x)R.",
        "it calls tuple": b"\x80\x02))R.",
        "sets attributes of function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\0\0\0makeX\x01\0\0\0xsb.",
    }
    return made


@pytest.mark.parametrize("write", [zipped, legacy])
def test_harmful_files_are_refused_and_nothing_runs(tmp_path, write):
    marker = tmp_path / "marker"
    for name, content in attacks(str(marker)).items():
        path = write(tmp_path / "file.pth", content)
        with pytest.raises(UnsafeFileError) as error:
            read_torch_file(path)
        assert str(error.value).startswith(f"{path}: "), name
        assert name in str(error.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.pth"]


def test_the_attacks_would_work(tmp_path):
    """That is, Python's own machine runs them."""
    for name in ("posix.system", "builtins.exec", "INST"):
        pickle.loads(attacks(str(tmp_path / name))[name])
        assert (tmp_path / name).exists(), name


IMPOSSIBLE = {
    "reaches beyond": tensor(6, (7,), (1,)),
    "storage 0 has 24 bytes": tensor(7, (6,), (1,)),
    "storage 0 has 24": tensor(2**59, (2**59,), (1,)),
    "what is no storage": tensor(2**62, (1,), (1,)),
    "without storage, dtype or offset": tensor(6, (2,), (1,), offset=-1),
    "tuple as a shape, expected at most 32 sizes": tensor(6, (2,), (-1,)),
    "shape \\(2, 3\\), strides \\(1,\\)": tensor(6, (2, 3), (1,)),
    "more than the file can hold": tensor(6, (2**40, 2), (0, 1)),
    "expected at most 32 sizes": b"\x80\x02ctorch\nSize\n(" + b"K\1" * 40 + b"t\x85R.",
    "Memo value not found at index 7": b"\x80\x02h\x07.",
    "pop from empty list": b"\x80\x02R.",
    "goes on beyond 1048576 instructions": b"\x80\x02" + b"N" * 2**22 + b".",
    "goes on beyond 4194304 bytes": b"\x80\x02X" + struct.pack("<I", 2**22) + b"N" * 2**22 + b".",
    "has no attribute 'append'": b"\x80\x02}Na.",
    "fills a list like a dict": b"\x80\x02]NNs.",
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_files(tmp_path, message):
    path = zipped(tmp_path / "file.pth", IMPOSSIBLE[message], np.arange(6, dtype=np.float32).tobytes())
    with pytest.raises(ValueError, match=f"file.pth: damaged or not a PyTorch file: .*{message}"):
        read_torch_file(path)


def test_values_that_are_shared_and_nested(tmp_path):
    laughs = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
    assert isinstance(read_torch_file(zipped(tmp_path / "a", laughs)), tuple)
    assert read_torch_file(zipped(tmp_path / "b", b"\x80\x02Nr\xff\xff\xff\x7f.")) is None
    itself = read_torch_file(zipped(tmp_path / "c", b"\x80\x02]q\0h\0a."))
    assert itself[0] is itself


@pytest.mark.parametrize("name", ["others.pth", "others_4.pth"])
def test_what_else_training_states_hold(name):
    found = read_torch_file(FILES / name)
    assert found["state_dict"]["n_averaged"] == 0
    assert found["state_dict"]["none"] is None
    assert found["state_dict"]["scalar"] == 2
    assert found["sets"] == ({}, {}, (1.5, None), {})
    assert found["rng"][0] == ("MT19937", {}, 624, 0, 0.0)
    assert found["defaults"] == {"a": [1]}
    assert found["milestones"] == {3: 1, 6: 1}
    assert [found[key] for key in ("date", "queue", "best", "numbers")] == [{}] * 4


def test_a_whole_model_is_refused_with_advice():
    message = r"whole\.pth: it names torch\.nn\.modules\.linear\.Linear, .* save the model's state_dict\(\) instead$"
    with pytest.raises(UnsafeFileError, match=message):
        read_torch_file(FILES / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this one is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "a tar archive"),
        (b"PK\x03\x04 and so on", "damaged"),
        (b"weights", "expected a PyTorch file .* it is none"),
        (pickle.dumps({"a": 1}, 2), "a pickle that torch.save did not write"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"file.pth: .*{message}"):
        read_torch_file(tmp_path / "file.pth")


def test_other_archives_are_named(tmp_path):
    values = np.arange(6, dtype=np.float32).tobytes()
    content = tensor(6, (6,), (1,))
    for archive, message in (
        ({"byteorder": b"big"}, "byte order b'big'"),
        ({"constants.pkl": b""}, "TorchScript"),
    ):
        with pytest.raises(ValueError, match=message):
            read_torch_file(zipped(tmp_path / "a", content, values, **archive))
    with pytest.raises(ValueError, match="data.pkl is compressed"):
        read_torch_file(zipped(tmp_path / "b", content, values, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(ValueError, match=r"without data\.pkl"):
        read_torch_file(tmp_path / "c")
    system = pickle.dumps({"little_endian": False}, 2)
    (tmp_path / "d").write_bytes(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + system)
    with pytest.raises(ValueError, match="big-endian"):
        read_torch_file(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "training.pth.tar"])
def test_truncated_files(tmp_path, name):
    whole, path = (FILES / name).read_bytes(), tmp_path / "file.pth"
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"file\.pth: "):
            read_torch_file(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_flipped_bits(tmp_path, name):
    """Nothing but the two errors; in the zip format every bit of a tensor is under a checksum."""
    whole, path = (FILES / name).read_bytes(), tmp_path / "file.pth"
    rng, silent = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = read_torch_file(path)
            assert_same(found, expected_tensors())
            silent += 1
        except AssertionError:
            assert name == "legacy.pth"
        except ValueError as error:
            assert str(path) in str(error)
    assert silent < 290


def test_opening_a_file_takes_little_memory(tmp_path):
    numel = 2**23
    path = zipped(tmp_path / "a", tensor(numel, (numel,), (1,)), bytes(4 * numel))
    tracemalloc.start()
    found = read_torch_file(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert found.nbytes == 2**25


def test_no_warning_and_no_torch():
    program = (
        "import sys; from vitpyramid.weights import read_torch_file; "
        f"read_torch_file({str(FILES / 'zip.pth')!r}); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "error:::vitpyramid", "-c", program]
    assert subprocess.run(command, cwd=golden.FOLDER.parents[1], check=False).returncode == 0
