"""DETR against facebookresearch's and mmdetection's, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden
from dense_networks import backbone, canvas, nchw, padded_targets
from vitpyramid import create_model
from vitpyramid.heads import set_prediction
from vitpyramid.heads.boxes import from_centres
from vitpyramid.heads.detector import rescale
from vitpyramid.heads.detr import DETR
from vitpyramid.heads.transformer import padding_mask, sine_positions
from vitpyramid.models.backbone import Backbone, Level
from vitpyramid.weights.dense_names import (
    flax_to_torch,
    from_state_dict,
    network_of,
    to_state_dict,
    torch_shapes,
    torch_to_flax,
)

EXACT = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Given(Backbone, kw_only=True):
    """A backbone without parameters, under heads that are given its map."""

    dims: tuple[int, ...]
    strides = (32,)
    stages = ()

    def features(self, images, train=False):
        return (Level(jnp.zeros((len(images), 2, 2, *self.dims)), 32),)


def network(meta: dict, below: Backbone | None = None, **options) -> DETR:
    """That of a file; on a map that is given, unless there is a backbone `below`."""
    fields = {
        "channels": "hidden",
        "ffn_channels": "ffn",
        "encoder_layers": "enc_layers",
        "decoder_layers": "dec_layers",
        "heads": "detr_heads" if below else "heads",
        "queries": "num_query" if below else "num_queries",
    }
    options |= {field: meta[name] for field, name in fields.items()}
    below = below or Given(dims=(meta["feature_channels"],))
    return create_model("detr_pvt_small", backbone=below, num_classes=meta["num_classes"], dtype=jnp.float64, **options)


def wide(variables):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)


def positions_of(golden, grid):
    """Padding and positions, which are checked."""
    meta = golden.meta
    padding = padding_mask(np.array(meta["img_shapes"]), meta["canvas"], grid)
    assert (padding == golden.array("mask")).all()
    assert golden.error("pos", nchw(sine_positions(padding, meta["hidden"], jnp.float64))) < EXACT
    return padding


def check_matches(golden, query, valid):
    for layer, image in np.ndindex(query.shape[:2]):
        expected = golden.data[f"match/layer{layer}_image{image}"]
        found = np.full(len(expected), -1)
        slots = np.flatnonzero(valid[image])
        found[query[layer, image, slots]] = slots
        assert (found == expected).all()


def check_gradients(golden, model, gradients, weights):
    errors = golden.gradient_errors(to_state_dict(model, gradients), weights)
    assert max(errors.values()) < EXACT, errors


def test_mmdetection():
    golden = DenseGolden("detr_mmdet_pvt")
    meta, weights = golden.meta, golden.state_dict()
    model = network(meta, backbone(meta), most_detections=meta["max_per_img"])
    variables = wide(from_state_dict(model, weights))
    images, sizes, targets = canvas(golden), np.array(meta["img_shapes"]), padded_targets(golden, 7)

    @jax.jit
    def everything(variables):
        def loss(variables):
            predictions = model.apply(variables, images, sizes, method="predict")
            losses = set_prediction.set_losses(*predictions, targets, sizes)
            return sum(value.sum() for value in losses.values()), (predictions, losses)

        (_, (predictions, losses)), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
        query = set_prediction.assign(*predictions, targets, sizes, focal=False, weights=set_prediction.DETR)
        found = model.apply(variables, images, sizes, method="detect")
        factors = np.float32(sizes) / np.float32(meta["ori_shapes"])
        return predictions, losses, gradients, query, rescale(found, factors)

    (logits, boxes), losses, gradients, query, found = everything(variables)
    positions_of(golden, (4, 6))
    assert golden.error("cls", logits) < EXACT and golden.error("box", boxes) < EXACT
    check_matches(golden, query, targets.valid)
    for name, theirs in {"loss_cls": "loss_cls", "loss_bbox": "loss_bbox", "loss_giou": "loss_iou"}.items():
        assert golden.error(f"loss/d0.{theirs}", losses[name][0]) < EXACT
        assert golden.error(f"loss/{theirs}", losses[name][1]) < EXACT
    check_gradients(golden, model, gradients, weights)
    detections = jnp.concatenate([found.boxes, found.scores[..., None]], axis=-1)
    assert golden.error("det_rescaled/boxes_scores", detections) < EXACT
    assert (found.labels == golden.data["det_rescaled/labels"]).all()


def test_facebookresearch():
    golden = DenseGolden("detr_official")
    meta, weights = golden.meta, golden.state_dict()
    model = network(meta, library="facebookresearch", clip=False)
    sizes, padding = np.array(meta["img_shapes"]), positions_of(golden, meta["feature_map"])
    meta["gt_boxes"] = [
        np.asarray(from_centres(np.array(boxes) * [width, height, width, height]))
        for boxes, (height, width) in zip(meta["gt_boxes_cxcywh"], sizes, strict=True)
    ]
    targets = padded_targets(golden, 7)

    @jax.jit
    def everything(variables, features):
        def loss(variables, features):
            predictions = model.apply(variables, features, padding, method="decode")
            losses = set_prediction.set_losses(*predictions, targets, sizes)
            return sum(value.sum() for value in losses.values()), (predictions, losses)

        (total, (predictions, losses)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, features)
        query = set_prediction.assign(*predictions, targets, sizes, focal=False, weights=set_prediction.DETR)
        found = set_prediction.detections(*(of[-1] for of in predictions), sizes, clip=False)
        return total, predictions, losses, gradients, query, rescale(found, sizes / np.array(meta["ori_shapes"]))

    features = golden.input("features").astype(np.float64).transpose(0, 2, 3, 1)
    total, (logits, of_boxes), losses, (gradients, to_features), query, found = everything(
        wide(from_state_dict(model, weights)), features
    )
    assert golden.error("logits", logits) < EXACT and golden.error("boxes", of_boxes) < EXACT
    check_matches(golden, query, targets.valid)
    weights_of = {"ce": ("cls", 1), "bbox": ("bbox", 5), "giou": ("giou", 2)}
    for layer, key in enumerate(("_0", "_1", "")):
        for theirs, (ours, weight) in weights_of.items():
            assert golden.error(f"loss/loss_{theirs}{key}", losses[f"loss_{ours}"][layer, None] / weight) < EXACT
    assert golden.error("loss/total", total[None]) < EXACT
    check_gradients(golden, model, gradients, weights)
    assert golden.error("grad_features", nchw(to_features)) < EXACT
    # Theirs stay in the queries' order.
    order = np.argsort(-golden.data["det/scores"], axis=1)
    assert (found.labels == np.take_along_axis(golden.data["det/labels"], order, axis=1)).all()
    for key, value in (("scores", found.scores), ("boxes", found.boxes)):
        back = np.empty(value.shape)
        for image, of_image in enumerate(order):
            back[image, of_image] = value[image]
        assert golden.error(f"det/{key}", back) < EXACT


def test_huggingface():
    """Its names, in memory and in files, and what its code makes of them."""
    golden = DenseGolden("detr_huggingface")
    meta, weights = golden.meta, golden.state_dict()
    model = network(meta, library="huggingface")
    variables = from_state_dict(model, weights)
    back = to_state_dict(model, variables)
    assert sorted(back) == meta["files"]
    again = from_state_dict(model, back)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), variables, again))
    padding = padding_mask(np.array(meta["img_shapes"]), meta["canvas"], (4, 6))
    features = golden.input("features").astype(np.float64).transpose(0, 2, 3, 1)
    logits, boxes = jax.jit(functools.partial(model.apply, method="decode"))(wide(variables), features, padding)
    assert golden.error("logits", logits[-1]) < EXACT and golden.error("boxes", boxes[-1]) < EXACT


def test_names_say_the_library():
    name = "detr_pvt_micro"
    for library in ("mmdetection", "facebookresearch", "huggingface"):
        model = create_model(name, library=library, num_classes=4, image_size=64)
        state_dict = {key: np.zeros(shape) for key, shape in torch_shapes(model).items()}
        state_dict = to_state_dict(model, from_state_dict(model, state_dict))
        shapes = {key: array.shape for key, array in state_dict.items()}
        found = network_of(name, shapes)
        assert found.pop("library", "mmdetection") == library
        assert found == {"name": name, "backbone": "", "num_classes": 4, "image_size": 64}
        assert flax_to_torch(name, torch_to_flax(name, state_dict), library).keys() == state_dict.keys()
