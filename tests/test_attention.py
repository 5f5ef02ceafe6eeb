"""Attention maps, what is read off them, and the tool that draws them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import traverse_util
from PIL import Image

import rest_by_hand
from harness import NARROW, random_images, random_variables
from vitpyramid import create_model
from vitpyramid.evals.attention import (
    AttentionMap,
    attention_maps,
    distance,
    entropy,
    query_map,
    rollout,
    spread,
    statistics,
)
from vitpyramid.tools import attention as tool
from vitpyramid.weights.store import write_weights

PROJECTIONS = ("q", "kv", "qkv", "kqv")


@functools.cache
def run(kind: str):
    """Maps, rollout and statistics of two images of 64 x 96, and the outputs of the projections, in one program."""
    model, variables = NARROW[kind], random_variables(NARROW[kind])

    def everything(variables, images):
        capture = {"capture_intermediates": lambda module, _: module.name in PROJECTIONS}
        _, state = model.apply(variables, images, mutable="intermediates", **capture)
        projected = traverse_util.flatten_dict(state["intermediates"], sep="/")
        projected = {path: found[0] for path, found in projected.items() if path.endswith("__call__")}
        maps = attention_maps(model, variables, images)
        return maps, rollout(maps), statistics(model, variables, images), projected

    return jax.tree.map(np.asarray, jax.jit(everything)(variables, random_images(2, 64, 96)))


def formula(found: AttentionMap, projected: dict) -> np.ndarray:
    """The map from what the module's projections gave, in float64."""
    parts = {name: projected.get(f"{found.path}/{name}/__call__") for name in PROJECTIONS}
    if found.kind == "kernel":
        key, query, _ = np.split(np.float64(parts["kqv"]), 3, axis=-1)
        w = np.float64(random_variables(NARROW["t2t"])["constants"]["tokens_to_token"][found.path.split("/")[1]]["w"])
        phi_query, phi_key = (np.exp(u @ w.T - (u**2).sum(-1, keepdims=True) / 2) / len(w) ** 0.5 for u in (query, key))
        products = phi_query @ phi_key.swapaxes(1, 2)
        return (products / (products.sum(-1, keepdims=True) + 1e-8))[:, None]
    if parts["qkv"] is not None:
        query, key, _ = parts["qkv"]
    else:
        key = parts["kv"][0]
        query = parts["q"].reshape(*parts["q"].shape[:2], *key.shape[2:])
    logits = np.einsum("bnhd,bmhd->bhnm", np.float64(query), np.float64(key)) * query.shape[-1] ** -0.5
    return scipy.special.softmax(logits, axis=-1)


@pytest.mark.parametrize("kind", ["pvt", "pit_distilled", "t2t"])
def test_maps_are_the_formulas(kind):
    maps, _, _, projected = run(kind)
    for found in maps:
        np.testing.assert_allclose(found.weights, formula(found, projected), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(found.distribution.sum(-1), 1, atol=1e-5)


def test_rest_maps_are_those_by_hand():
    maps, _, _, _ = run("rest")
    model = NARROW["rest"]
    by_hand = rest_by_hand.Numpy(rest_by_hand.torch_weights(random_variables(model)), model)
    by_hand.features(random_images(2, 64, 96))
    expected = {f"{'.'.join(name.split('.')[:2])}": weights for name, weights in by_hand.attention.items()}
    assert [found.kind for found in maps] == ["reduced", "mixed", "mixed", "mixed", "mixed"]
    for found in maps:
        weights = expected[found.path.removesuffix("/attn").replace("_", ".")]
        np.testing.assert_allclose(found.weights, weights, rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(found.distribution.sum(-1), 1, atol=1e-5)
        if found.kind == "mixed":
            centred = found.softmax - found.softmax.mean((2, 3), keepdims=True)
            centred /= np.sqrt(np.square(centred).mean((2, 3), keepdims=True) + 1e-5)
            np.testing.assert_allclose(found.weights, centred, rtol=1e-3, atol=1e-3)


# Of two images of 64 x 96: stage, kind, grid, key grid, class tokens.
LAYERS = {
    "pvt": [
        (1, "reduced", (16, 24), (2, 3), 0),
        (2, "reduced", (8, 12), (2, 3), 0),
        (3, "reduced", (4, 6), (2, 3), 0),
        (3, "reduced", (4, 6), (2, 3), 0),
        (4, "full", (2, 3), (2, 3), 1),
    ],
    "pit_distilled": [
        (1, "full", (7, 11), (7, 11), 2),
        (2, "full", (4, 6), (4, 6), 2),
        (2, "full", (4, 6), (4, 6), 2),
        (3, "full", (2, 3), (2, 3), 2),
    ],
    "t2t": [
        (0, "kernel", (16, 24), (16, 24), 0),
        (0, "kernel", (8, 12), (8, 12), 0),
        (1, "full", (4, 6), (4, 6), 1),
        (1, "full", (4, 6), (4, 6), 1),
    ],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_and_their_grids(kind):
    maps, rolled, numbers, _ = run(kind)
    assert [(f.stage, f.kind, f.grid, f.key_grid, f.extra) for f in maps] == LAYERS[kind]
    assert rolled.shape == (2, *maps[0].grid)
    np.testing.assert_allclose(rolled.sum((1, 2)), 1, atol=1e-5)
    assert rolled.min() >= 0
    for found, (entropies, distances) in zip(maps, numbers, strict=True):
        # The definitions, with positions written out.
        weights = np.float64(found.distribution[:, :, found.extra :, -found.key_grid[0] * found.key_grid[1] :])
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(entropies, scipy.special.entr(weights).sum(-1).mean(-1), rtol=1e-4)
        queries, keys = (
            np.stack(np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij"), -1).reshape(-1, 2)
            for h, w in (found.grid, found.key_grid)
        )
        apart = np.abs(queries[:, None] - keys).sum(-1)
        np.testing.assert_allclose(distances, (weights * apart).sum(-1).mean(-1), rtol=1e-4)


def made(weights, grid=(2, 2), key_grid=None, extra=0) -> AttentionMap:
    weights = jnp.asarray(weights, jnp.float32)[None, None]
    return AttentionMap(weights, None, "x", "full", 1, grid, key_grid or grid, extra)


def test_entropy_and_distance_at_their_ends():
    even, own, far = made(np.full((4, 4), 0.25)), made(np.eye(4)), made(np.eye(4)[::-1])
    assert entropy(even)[0, 0] == pytest.approx(np.log(4))
    assert entropy(own)[0, 0] == distance(own)[0, 0] == 0
    assert distance(even)[0, 0] == pytest.approx(0.5)
    assert distance(far)[0, 0] == pytest.approx(1.0)  # half a side in each direction
    with_class = np.array([[0.6, 0.1, 0.3], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    assert entropy(made(with_class, (1, 2), extra=1))[0, 0] == 0
    np.testing.assert_allclose(query_map(made(with_class, (1, 2), extra=1))[0, 0], [[0.1, 0.3]])
    np.testing.assert_allclose(query_map(made(with_class, (1, 2), extra=1), (0.9, 0.9))[0, 0], [[0.0, 0.5]])


def test_rollout_of_known_maps():
    first, second = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[1.0, 0.0], [0.5, 0.5]])
    mixed = [(np.eye(2) + weights) / 2 for weights in (first, second)]
    expected = (mixed[1] @ mixed[0]).mean(0)
    np.testing.assert_allclose(rollout((made(first, (1, 2)), made(second, (1, 2))))[0, 0], expected, rtol=1e-6)
    # One class token, of which 0.5 stays and 0.5 * (0.6, 0.1, 0.3) goes where it looks; then spread over a finer grid.
    with_class = np.array([[0.6, 0.1, 0.3], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    pooled = rollout((made(np.eye(8), (2, 4)), made(with_class, (1, 2), extra=1)))
    np.testing.assert_allclose(pooled[0], [[1 / 16, 1 / 16, 3 / 16, 3 / 16]] * 2, rtol=1e-6)
    reduced = rollout((made([[1.0], [1.0]], (1, 2), (1, 1)),))
    np.testing.assert_allclose(reduced[0], [[0.5, 0.5]])
    np.testing.assert_allclose(spread(jnp.array([[[3.0, 1.0]]]), (1, 3)), [[[2, 4 / 3, 2 / 3]]], rtol=1e-6)


def test_what_cannot_be_told_apart_is_refused():
    model = NARROW["pvt"].clone(scan=True, remat=True)
    with pytest.raises(ValueError, match="scan=True: expected"):
        attention_maps.eval_shape(model, {}, jnp.zeros((1, 64, 64, 3)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "pvt"
    variables = random_variables(create_model("pvt_micro"))
    write_weights(folder, {"name": "pvt_micro", "num_classes": 10, "image_size": 32}, variables)
    return folder


def test_command(weights, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    out = tmp_path / "maps.png"
    args = [str(tmp_path), f"--checkpoint={weights}", f"--out={out}"]
    assert tool.main(args) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert [layer["path"] for layer in report["layers"]] == [f"block{s}_0/attn" for s in (1, 2, 3, 4)]
    for layer in report["layers"]:
        assert len(layer["entropy"]) == layer["heads"] and max(layer["entropy"]) <= layer["entropy_limit"] + 1e-6
    for layer in report["layers"][:3]:  # the last stage has one token
        assert min(layer["distance"]) > 0 and max(layer["distance"]) < 2
    assert len(report["images"]) == 2
    page = Image.open(out)
    assert f"{page.width} x {page.height} pixels; numbers of 2 images" in capsys.readouterr().out
    assert tool.main([*args, "--layer=block4_0", "--point=0.2,0.9"]) == 0
    assert tool.main([*args, "--layer=block9"]) == 1
    assert "expected one of block1_0, block2_0, block3_0, block4_0" in capsys.readouterr().err
    for wrong, message in (("--point=2,0", "expected Y,X"), ("--out=x.jpg", ".png in a folder that exists")):
        assert tool.main([*args, wrong]) == 1
        assert message in capsys.readouterr().err


def test_a_layer_is_drawn_where_it_looks():
    weights = np.zeros((4, 4))
    weights[3, 1] = 1  # the token in the middle is the last
    weights[:3, 0] = 1
    image = np.full((128, 128, 3), 100, np.uint8)
    page = np.asarray(tool.maps_picture("t", image, (made(weights),)))
    tile = page[22 : 22 + 128, 4 + 132 : 4 + 132 + 128]  # the second; the first is the image
    bright = tile.astype(int).sum(-1)
    assert bright[:64, 64:].min() > bright[:64, :64].max()
    assert (bright[64:] == bright[0, 0]).all()
