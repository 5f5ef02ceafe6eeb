"""RetinaNet against mmdetection and detectron2, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden
from dense_networks import backbone, canvas, nchw, padded_targets, two_devices
from vitpyramid import create_model
from vitpyramid.heads.detector import rescale
from vitpyramid.weights.dense_names import from_state_dict, to_state_dict

EXACT = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("stem", ["retinanet_pvt", "retinanet_rest"])
def test_original(stem):
    golden = DenseGolden(stem)
    meta, weights = golden.meta, golden.state_dict()
    rest = stem.endswith("rest")
    test = meta.get("test_cfg") or {"nms_pre": meta["topk"], "max_per_img": meta["max_det"]}
    model = create_model(
        f"retinanet_{stem.split('_')[1]}_small",
        backbone=backbone(meta),
        num_classes=meta["num_classes"],
        channels=meta["feat_channels"],
        most_candidates=test["nms_pre"],
        most_detections=test["max_per_img"],
        dtype=jnp.float64,
    )
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), from_state_dict(model, weights))
    images, sizes, targets = canvas(golden), np.array(meta["img_shapes"]), padded_targets(golden, 7)

    @jax.jit
    def evaluate(variables):
        predictions = model.apply(variables, images, method="predict")
        return predictions, model.detections_of(predictions, sizes), model.assign(predictions.levels, targets, sizes)

    @jax.jit
    def train(params, others, images, targets, sizes):
        def loss(params):
            found, updated = model.apply(
                {"params": params, **others}, images, targets, sizes, method="losses", mutable=list(others)
            )
            return sum(value.sum() for value in found.values()), (found, updated)

        return jax.value_and_grad(loss, has_aux=True)(params)

    predictions, detections, (label, match) = evaluate(variables)
    k = meta["num_classes"]
    names = [f"eval/p{i}" for i in range(3, 8)] if rest else [f"neck{i}" for i in range(5)]
    cls, reg = ("eval/logits", "eval/deltas") if rest else ("cls_score", "bbox_pred")
    for i, (level, logits, deltas) in enumerate(
        zip(predictions.levels, predictions.logits, predictions.deltas, strict=True)
    ):
        grid = level.x.shape[1:3]
        assert golden.error(names[i], nchw(level.x)) < EXACT
        assert golden.error(f"{cls}{i}", nchw(logits.reshape(2, *grid, 9 * k))) < EXACT
        assert golden.error(f"{reg}{i}", nchw(deltas.reshape(2, *grid, 9 * 4))) < EXACT
    assert golden.error("anchors", np.concatenate(model.anchors(predictions.levels))) < EXACT

    labels = jnp.where(label == 1, jnp.take_along_axis(targets.labels, match, axis=1), jnp.where(label < 0, -1, k))
    stored = golden.array("labels")
    if rest:
        assert (labels == stored).all()
    else:
        assert ((labels == stored) | (golden.array("label_weights") == 0)).all()
        assert ((label >= 0) == golden.array("label_weights")).all()
    assert (np.argwhere(label == 1) == golden.array("pos_index")).all()

    for key, found, factors, limits in (
        ("det", detections, None, None),
        ("det_rescaled", detections, sizes / np.array(meta["ori_shapes"]), np.array(meta["ori_shapes"])),
    ):
        if factors is not None:
            found = rescale(found, *((factors, limits) if rest else (factors.astype(np.float32),)))
        assert (found.valid.sum(axis=1) == golden.array(f"{key}/count")).all()
        assert golden.error(f"{key}/boxes_scores", jnp.concatenate([found.boxes, found.scores[..., None]], -1)) < EXACT
        assert (found.labels == golden.array(f"{key}/labels")).all()

    params = variables.pop("params")
    with two_devices() as split:
        (total, (found, updated)), gradients = train(params, variables, *split((images, targets, sizes)))
    assert golden.error("loss/total", total[None]) < EXACT
    if rest:
        assert golden.error("loss/loss_cls", found["loss_cls"].sum(keepdims=True)) < EXACT
        assert golden.error("loss/loss_box_reg", found["loss_bbox"].sum(keepdims=True)) < EXACT
        assert golden.error("loss/normalizer", updated["batch_stats"]["loss_normaliser"][None]) < EXACT
    else:
        assert golden.error("loss/loss_cls", found["loss_cls"]) < EXACT
        assert golden.error("loss/loss_bbox", found["loss_bbox"]) < EXACT
    found = to_state_dict(model, {"params": gradients, **updated})
    errors = golden.gradient_errors(found, weights)
    assert max(errors.values()) < EXACT, errors
    for key in golden.data:
        if key.startswith("bn/"):
            assert golden.error(key, found[key.removeprefix("bn/")]) < EXACT, key
