"""Small sources and configs for the tests of `vitpyramid.data`, and what they do with batches."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict
from PIL import Image


class Memory(SimpleNamespace):
    """The source protocol over a list of PNGs; the label of record i is i."""

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return {"image": self.records[index], "label": index}

    def where(self, index):
        return f"record {index}"


def encoded(image, file_format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(count):
    """Small images, all different."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 12, 10, 3), np.uint8)
    return [encoded(Image.fromarray(image)) for image in pixels]


def memory(count):
    return Memory(name="memory", split="train", records=noise(count))


def make_config(data_dir="", **keys):
    data = {"name": "digits", "data_dir": str(data_dir), "train_split": "train", "eval_split": "test"}
    data |= {"image_size": 8, "crop_scale": (0.3, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip": 0.5, "eval_crop": 0.875}
    data |= {"threads": 2, "workers": 0, "repeats": 0, "on_corrupt": "error", "auto_augment": ""}
    data |= {"interpolation": "bicubic", "eval_interpolation": "bicubic", "color_jitter": 0.0, "crop_padding": 0}
    config = ConfigDict(
        {"seed": 3, "batch_size": 8, "eval": {"batch_size": 8}, "data": data, "mix": {"groups": 1}}, type_safe=False
    )
    config.update_from_flattened_dict(keys)
    return config


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])


def side_by_side(hosts):
    """The global batches of several hosts' lists of batches."""
    return [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]} for step in zip(*hosts, strict=True)
    ]


def run_python(*arguments):
    """Runs another interpreter that, from any directory and in its workers, imports this checkout and this file."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=python_environment(), timeout=120)


def python_environment():
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}
