"""vitpyramid.tools.features."""

import json

import numpy as np
import pytest
from PIL import Image

from harness import random_variables
from vitpyramid import create_model
from vitpyramid.models.backbone import Level
from vitpyramid.tools import chart
from vitpyramid.tools import features as tool
from vitpyramid.weights.store import write_weights


def test_colours_are_the_principal_components():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    parts = np.stack(np.broadcast_arrays(*np.ogrid[0:9, 0:4, 0:1]), -1)[:, :, 0].astype(float)  # rows, columns, 0
    x = (parts * [2, 1, 0]) @ basis[:3] + 5 + 1e-6 * rng.standard_normal((9, 4, 8))
    found = tool.colours(x).astype(int)
    for axis, channel in ((0, 0), (1, 1)):  # rows vary most
        expected = np.broadcast_to(np.expand_dims(np.linspace(0, 255, x.shape[axis]), 1 - axis), (9, 4))
        assert min(np.abs(found[..., channel] - e).max() for e in (expected, 255 - expected)) <= 1


def test_the_picture_shows_what_varies():
    x = np.zeros((1, 2, 2, 5))
    x[0, ..., 3] = [[0, 1], [2, 3]]
    x[0, ..., 1] = [[0, 0], [0, 0.1]]
    image = np.full((128, 128, 3), 7, np.uint8)
    page = np.asarray(tool.pyramid_picture("t", image, [Level(x, 16)], channels=1))
    assert page.shape == (128 + 14 + 4 + 14 + 8, 3 * 132 + 4, 3)
    np.testing.assert_array_equal(page[22:150, 4:132], image)
    tile = page[22:150, 4 + 2 * 132 : 4 + 2 * 132 + 128]
    np.testing.assert_array_equal(tile[::64, ::64], chart.heat(x[0, ..., 3]))


def test_command(tmp_path, capsys):
    variables = random_variables(create_model("pit_micro"))
    write_weights(tmp_path / "weights", {"name": "pit_micro", "num_classes": 10, "image_size": 32}, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    args = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), f"--checkpoint={tmp_path / 'weights'}"]
    out = tmp_path / "out.png"
    assert tool.main([*args, f"--out={out}"]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    network = tool.open_network(str(tmp_path / "weights"))
    _, images = tool.read_images(network, args[:2])
    levels = tool.pyramid(network.model, network.variables, network.inputs(images))
    for found, level in zip(report["levels"], levels, strict=True):
        x = np.float64(level.x)
        assert (found["stride"], found["height"], found["width"], found["channels"]) == (level.stride, *x.shape[1:])
        assert found["mean"] == pytest.approx(x.mean(), abs=1e-4)
        assert found["std"] == pytest.approx(x.std(), rel=1e-4)
        rms = np.sqrt(np.square(x).mean((0, 1, 2)))
        assert found["largest"] == pytest.approx(rms.max() / np.sqrt(np.median(np.square(rms))), rel=1e-4)
        assert found["silent"] == 0
    printed = capsys.readouterr().out
    assert "numbers of 2 images in out.json" in printed
    assert tool.main([str(tmp_path / "absent.png"), *args[2:]]) == 1
    assert "no image could be read" in capsys.readouterr().err
