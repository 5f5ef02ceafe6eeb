"""Boxes, anchors, assignment, suppression and RoIAlign against the numbers of the original code, in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden, tensor
from vitpyramid.heads import anchors, boxes, matching
from vitpyramid.heads.nms import nms
from vitpyramid.heads.roi_align import bin_weights, roi_align
from vitpyramid.heads.selection import largest, top_k
from vitpyramid.models.backbone import Level

EXACT = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def check(golden, key, value):
    assert golden.error(key, value) < EXACT, key


STRIDES = {"retinanet": (8, 16, 32, 64, 128), "rpn": (4, 8, 16, 32, 64)}
SCALES = {"retinanet": [4 * 2 ** (k / 3) for k in range(3)], "rpn": [8]}


@pytest.mark.parametrize("head", ["retinanet", "rpn"])
@pytest.mark.parametrize("library", ["mmdet", "d2"])
def test_anchors(library, head):
    golden = DenseGolden("anchors")
    order = "ratio" if library == "mmdet" else "size"
    base = [anchors.base_anchors([s * stride for s in SCALES[head]], order=order) for stride in STRIDES[head]]
    check(golden, f"{library}_{head}/base", base)
    height, width = golden.meta["canvas"]
    for i, stride in enumerate(STRIDES[head]):
        grid = -(-height // stride), -(-width // stride)
        check(golden, f"{library}_{head}/grid{i}", anchors.grid_anchors(base[i], grid, stride, np.float64))
        if library == "mmdet":
            sizes = np.array([[height - 32, width - 64], [height - 63, width - 95]])  # the same once padded
            valid = anchors.inside_pyramid([Level(np.empty((1, *grid, 1)), stride)], sizes, len(base[i]))
            assert (valid == golden.data[f"mmdet_{head}/valid{i}"]).all()


def test_coder_and_overlaps():
    golden = DenseGolden("box_coder")
    of, targets, deltas = (golden.data[key] for key in ("boxes", "targets", "deltas"))
    for library in ("mmdet", "d2"):
        for head, stds in (("unit", (1, 1, 1, 1)), ("rcnn", (0.1, 0.1, 0.2, 0.2))):
            check(golden, f"{library}_{head}/encode", boxes.encode(of, targets, stds))
            decoded = boxes.decode(of, deltas, stds, clamp_below=library == "mmdet")
            check(golden, f"{library}_{head}/decode", decoded)
            if library == "mmdet":
                check(golden, f"mmdet_{head}/decode_clipped_150x180", boxes.clip(decoded, np.array([150, 180])))
    of_class = boxes.decode(of[:6, None], golden.data["class_deltas"].reshape(6, 3, 4), (0.1, 0.1, 0.2, 0.2))
    clipped = boxes.clip(of_class.reshape(-1, 4), np.array([150, 180]))
    check(golden, "mmdet_rcnn/decode_class_specific", clipped.reshape(6, 12))
    for kind in ("iou", "iof", "giou"):
        check(golden, kind, boxes.overlaps(of[:12], targets[:10], kind))
    empty = np.array([[0, 0, 0, 0], [10, 10, 10, 10]], float)
    assert (boxes.overlaps(empty, empty) == 0).all()
    np.testing.assert_allclose(boxes.overlaps(empty, empty, "giou"), [[0, -1 + 1e-8], [-1 + 1e-8, 0]], rtol=1e-12)


SETTINGS = {
    "mmdet_retinanet": {"positive": 0.5, "negative": 0.4, "low_quality": "match", "least": 0.0},
    "mmdet_rpn": {"positive": 0.7, "negative": 0.3, "low_quality": "match", "least": 0.3},
    "mmdet_rcnn": {"positive": 0.5, "negative": 0.5, "low_quality": "match", "least": 0.5},
    "mmdet_rcnn_no_low_quality": {"positive": 0.5, "negative": 0.5, "low_quality": None},
    "d2_retinanet": {"positive": 0.5, "negative": 0.4, "low_quality": "label"},
    "d2_rpn": {"positive": 0.7, "negative": 0.3, "low_quality": "label"},
    "d2_rcnn": {"positive": 0.5, "negative": 0.5, "low_quality": None},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_assignment(setting):
    """Also with slots for boxes that are not there, and anchors that are outside, whatever they overlap."""
    golden = DenseGolden("assigner")
    assign = jax.jit(functools.partial(matching.assign, **SETTINGS[setting]))
    for i in range(4):
        overlaps = golden.data[f"overlaps{i}"]
        g, n = overlaps.shape
        padded = np.ones((g + 2, n + 3))
        padded[:g, :n] = overlaps
        for array, box_valid, anchor_valid in (
            (overlaps, np.ones(g, bool), True),
            (padded, np.arange(g + 2) < g, np.arange(n + 3) < n),
        ):
            label, match = assign(array, box_valid, anchor_valid)
            assert (label[n:] == -1).all()
            label, match = label[:n], match[:n]
            if setting.startswith("mmdet"):
                found = np.where(label == 1, match + 1, label)
                assert (found == golden.data[f"{setting}/gt{i}"]).all()
            else:
                assert (label == golden.data[f"{setting}/label{i}"]).all()
                assert (match == golden.data[f"{setting}/match{i}"])[label == 1].all()


def test_sampling():
    """The lowest indices without a key; with one at random; few positives are filled up with background."""
    label = jnp.array([0, 1, 0, 1, -1, 1, 0, 0, -1, 0])
    sample = jax.jit(matching.sample, static_argnums=(1, 2))
    index, positive, valid = sample(label, 6, 2, None)
    assert index.tolist() == [1, 3, 0, 2, 6, 7] and positive.tolist() == [True] * 2 + [False] * 4 and valid.all()
    index, positive, valid = sample(label, 12, 6, None)
    assert index.tolist() == [1, 3, 5, 0, 2, 6, 7, 9] + [0] * 4 and (valid == (np.arange(12) < 8)).all()
    assert (positive == (np.arange(12) < 3)).all()
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = jax.vmap(lambda key: sample(label, 4, 1, key).index)(keys)
    assert {*drawn[:, 0].tolist()} == {1, 3, 5} and {*drawn[:, 1:].ravel().tolist()} == {0, 2, 6, 7, 9}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def multiclass(of, scores, threshold, most, block):
    """As the second stage has it: every box with every class."""
    n, k = scores.shape
    pairs, classes = jnp.repeat(of, k, axis=0), jnp.tile(jnp.arange(k), n)
    return nms(pairs, scores.ravel(), scores.ravel() > threshold, 0.5, most, classes, block), classes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_of_many_are_those_of_a_sort(dtype):
    """With many equal ones, two zeros, infinities, and fewer numbers than are asked for."""
    values = np.random.default_rng(0).integers(-40, 40, 9000) / 8
    values[:9] = -0.0, 0.0, -np.inf, -np.inf, np.inf, 1e-38, -1e-38, 3e38, -3e38
    values = values.astype(dtype)
    order = np.lexsort((np.signbit(values), -values))  # stable
    for k in (1, 700, 8999):
        found, index = jax.jit(top_k, static_argnums=1)(values, k)
        np.testing.assert_array_equal(index, order[:k])
        np.testing.assert_array_equal(found, values[order[:k]])
    for number in (0, 5, 9001):
        np.testing.assert_array_equal(np.flatnonzero(largest(values, number)), np.sort(order[:number]))


def test_the_largest_of_many_are_found_without_sums_over_all_of_them():
    """Which a TPU's compiler takes minutes for."""
    of_anchors = jax.ShapeDtypeStruct((268_569,), jnp.float32)
    text = jax.jit(lambda x: top_k(x, 2000)).trace(of_anchors).lower(lowering_platforms=("tpu",)).as_text()
    windows = re.findall(r"window_dimensions = array<i64: (\d+)>", text)
    assert windows and max(map(int, windows)) < 3000


@pytest.mark.parametrize("block", [512, 7])
def test_suppression(block):
    golden = DenseGolden("nms")
    of, scores = jnp.asarray(golden.data["boxes"]), jnp.asarray(golden.data["scores"])
    suppress = jax.jit(nms, static_argnums=(4,), static_argnames="block")
    for threshold in (0.3, 0.5, 0.7):
        expected = golden.data[f"nms{threshold}/keep"]
        kept = suppress(of, scores[:, 0], jnp.ones(len(of), bool), threshold, len(of), block=block)
        assert (kept.index[: len(expected)] == expected).all() and kept.valid.sum() == len(expected)
    for name, threshold, most in (("multiclass", 0.05, 25), ("multiclass_threshold0.5", 0.5, 500)):
        kept, classes = multiclass(of, scores, threshold, most, block)
        expected = golden.data[f"{name}/boxes_scores"]
        assert kept.valid.sum() == len(expected)
        found = jnp.concatenate([kept.boxes, kept.scores[:, None]], axis=1)
        check(golden, f"{name}/boxes_scores", found[: len(expected)])
        assert (found[len(expected) :] == 0).all()
        assert (classes[kept.index][: len(expected)] == golden.data[f"{name}/labels"]).all()
    kept, _ = multiclass(of, scores, 0.0, 50, block)
    assert (kept.index == golden.data["batched/keep"]).all()


def test_a_box_that_overlaps_by_the_threshold_stays():
    golden = DenseGolden("nms")
    of = jnp.asarray(golden.data["edge/boxes"])
    kept = jax.jit(nms, static_argnums=4)(of, jnp.arange(5.0)[::-1], jnp.ones(5, bool), 0.5, 5)
    expected = golden.data["edge/keep_0.5_not_suppressed_at_equality"]
    assert kept.index[kept.valid].tolist() == expected.tolist()
    assert not nms(of[:0], jnp.zeros(0), jnp.zeros(0, bool), 0.5, 3).valid.any()


@pytest.mark.parametrize("points", [0, 2])
@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align(bins, points):
    golden = DenseGolden("roi_align")
    rois, maps = jnp.asarray(golden.data["rois"]), jnp.asarray(golden.input("input").transpose(0, 2, 3, 1), jnp.float64)
    image = rois[:, 0].astype(int)

    def regions(maps):
        out = jax.vmap(lambda x: roi_align(x, rois[:, 1:], bins, 1 / golden.meta["spatial_scale"], points))(maps)
        return out[image, jnp.arange(len(rois))].transpose(0, 3, 1, 2)

    def with_gradient(maps, cotangent):
        out, backward = jax.vjp(regions, maps)
        return out, backward(cotangent)[0].transpose(0, 3, 1, 2)

    cotangent = tensor(golden.meta["seed"], f"cotangent{bins}_{points}", (len(rois), maps.shape[-1], bins, bins))
    out, gradient = jax.jit(with_gradient)(maps, jnp.asarray(cotangent, jnp.float64))
    check(golden, f"out{bins}_sampling{points}", out)
    check(golden, f"grad_input{bins}_sampling{points}", gradient)


def test_bins_of_any_length():
    """A region hundreds of cells long has as many points in a bin as cells, and each is counted."""
    low = np.array([-3.2, 0.0, 11.3, 99.0, 300.0, -400.0, 20.5])
    high = np.array([950.1, 97.0, 11.4, 99.0, 4000.0, 30.0, 27.5])
    found = jax.jit(bin_weights, static_argnums=(2, 3))(low, high, 7, 97)
    expected = np.zeros((len(low), 7, 97))
    for r in range(len(low)):
        width = (high[r] - low[r]) / 7
        number = int(np.ceil(width))
        for b, k in np.ndindex(7, number):
            place = low[r] - 0.5 + b * width + (k + 0.5) * width / number
            if -1 <= place <= 97:
                place = np.clip(place, 0, 96)
                expected[r, b, int(place)] += (1 - place % 1) / number
                expected[r, b, min(int(place) + 1, 96)] += place % 1 / number
    np.testing.assert_allclose(found, expected, atol=1e-12)
