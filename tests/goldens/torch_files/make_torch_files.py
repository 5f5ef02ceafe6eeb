"""Writes the files in this folder with PyTorch (they were made with 2.13): `python make_torch_files.py`.

The values are computed again by tests/test_reader.py; `legacy_views.pth` has views of storages as PyTorch 0.4 wrote
them, and is put together by hand.
"""

import argparse
import collections
import datetime
import pathlib
import pickle
import random
import struct

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


def tensors() -> dict:
    base = torch.arange(24, dtype=torch.float32)
    made = {dtype: (torch.arange(6) % 5 - 2).to(getattr(torch, dtype)).reshape(2, 3) for dtype in DTYPES}
    return made | {
        "base": base,
        "shared": base[4:10].reshape(2, 3),
        "transposed": base.reshape(4, 6).t(),
        "strided": base[1::5],
        "expanded": base[3:4].expand(3, 4),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def save(name: str, content, **options) -> None:
    torch.save(content, FOLDER / name, **options)


if __name__ == "__main__":
    save("zip.pth", tensors())
    save("legacy.pth", tensors(), _use_new_zipfile_serialization=False)
    save(
        "float8.pth",
        {
            "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
            "uint16": torch.tensor([7, 65535], dtype=torch.uint16),
        },
    )
    state = {
        "state_dict": collections.OrderedDict(tensors()),
        "args": argparse.Namespace(lr=0.1, path=pathlib.PosixPath("a/b")),
        "metric": np.float64(1.5),
        "epoch": 3,
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]},
    }
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    others = {
        "state_dict": {**average.state_dict(), "none": None, "scalar": 2.0},
        "sets": ({1, 2}, frozenset({"a"}), (1.5, None), {(0, 1): "a tuple", 0.5: "a number"}),
        "rng": [np.random.RandomState(0).get_state(), np.random.default_rng(0), np.random.RandomState(0)],
        "date": datetime.datetime(2020, 1, 1),
        "queue": collections.deque([1, 2]),
        "best": np.float32(1.5),
        "random": random.Random(0).getstate(),
        "numbers": np.arange(3),
        "defaults": collections.defaultdict(list, a=[1]),
        "milestones": collections.Counter([3, 6]),
    }
    save("others.pth", others)
    save("others_4.pth", others, pickle_protocol=4)
    save("whole.pth", torch.nn.Linear(2, 1))
    state["state_dict"]._metadata = {"": {"version": 1}}
    save("training.pth.tar", state)
    torch.serialization.set_crc32_options(False)
    save("no_checksums.pth", {"a": torch.arange(3.0)})

    class Reference(pickle.Pickler):
        def persistent_id(self, value):
            return value.reference if isinstance(value, View) else None

    class View:
        def __init__(self, *view):
            self.reference = ("storage", torch.FloatStorage, "root", "cpu", 8, view)

        def __reduce__(self):
            raise TypeError

    class Rebuild:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return torch._utils._rebuild_tensor, self.arguments

    with (FOLDER / "legacy_views.pth").open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
            pickle.dump(part, file, 2)
        views = {"low": Rebuild(View("a", 1, 3), 0, (3,), (1,)), "high": Rebuild(View("b", 4, 4), 1, (3,), (1,))}
        Reference(file, 2).dump(views)
        pickle.dump(["root"], file, 2)
        file.write(struct.pack("<q", 8) + np.arange(8, dtype=np.float32).tobytes())
