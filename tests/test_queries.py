"""The attention tool on DETR: where its object queries look."""

import json

import numpy as np
import pytest
from PIL import Image

from harness import random_variables
from vitpyramid import create_model
from vitpyramid.tools import attention as tool
from vitpyramid.tools import dense, queries
from vitpyramid.weights.store import write_weights

NETWORK = {"name": "detr_pvt_micro", "backbone": "", "num_classes": 4, "image_size": 64}


def test_command(tmp_path, capsys):
    variables = random_variables(create_model(**NETWORK))
    write_weights(tmp_path / "weights", NETWORK, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = tmp_path / "queries.png"
    args = [str(tmp_path / "a.png"), f"--checkpoint={tmp_path / 'weights'}", f"--out={out}", "--size=64x96"]
    layer = "transformer/decoder/layers_0"
    assert tool.main([*args, f"--layer={layer}"]) == 0
    (report,) = json.loads(out.with_suffix(".json").read_text())["images"]
    assert sorted(query["query"] for query in report["queries"]) == list(range(10))
    scores = [query["score"] for query in report["queries"]]
    assert scores == sorted(scores, reverse=True)
    page = Image.open(out)
    assert f"{page.width} x {page.height} pixels; queries of 1 images" in capsys.readouterr().out
    for wrong, message in (("--layer=x", "expected one of transformer/decoder/layers_0"), ("--point=0,0", "no point")):
        assert tool.main([*args, wrong]) == 1
        assert message in capsys.readouterr().err

    # 40 x 50 becomes 64 x 80 on a canvas of 64 x 96, whose last two columns of cells are padding.
    task = dense.open_task(str(tmp_path), NETWORK, (64, 96))
    rows, found = queries.object_queries(task, variables, Image.fromarray(pixels), layer)
    assert rows["size"].tolist() == [[64, 80]] == [report["size"]]
    for query, listed in zip(found, report["queries"], strict=True):
        assert query.weights.shape == (8, 8, 12) and not query.weights[..., 10:].any()
        np.testing.assert_allclose(query.weights.sum((1, 2)), 1, atol=1e-5)
        assert 0 <= listed["attention_inside"] <= 1.0001 and listed["query"] == query.number


def test_deformable(tmp_path):
    """Places and weights of the sampling, which may lie outside of the image."""
    network = {"name": "deformable_detr_pit_micro", "backbone": "", "num_classes": 4, "image_size": 64}
    variables = random_variables(create_model(**network))
    write_weights(tmp_path / "weights", network, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    task = dense.open_task(str(tmp_path), network, (64, 96))
    layer = queries.layers(task.model)[-1]
    rows, found = queries.object_queries(task, variables, Image.fromarray(pixels), layer)
    assert len(found) == 20
    for query in found:
        assert query.places.shape == (4, 3, 4, 2) and 0 <= query.inside((64, 96)) <= 1.0001
        np.testing.assert_allclose(query.weights.sum((1, 2)), 1, atol=1e-5)
    page = queries.picture("a", rows["image"][0], rows["size"][0], found, "abcd")
    assert len(np.unique(np.asarray(page).reshape(-1, 3), axis=0)) > 20


def test_the_share_inside_of_a_box():
    weights = np.zeros((2, 4, 6))
    weights[0, 1, 2] = weights[1, 3, 5] = 1
    found = queries.Query(0, 1, 0.9, np.array([8.0, 4.0, 12.0, 8.0]), weights)
    assert found.inside((16, 24)) == pytest.approx(0.5)
    places = np.array([[[[9.0, 5.0], [13.0, 5.0]]], [[[-1.0, 5.0], [8.0, 4.0]]]])
    found = queries.Query(0, 1, 0.9, found.box, np.array([[[0.7, 0.3]], [[0.4, 0.6]]]), places)
    assert found.inside((16, 24)) == pytest.approx(0.65)
