"""Mask R-CNN against mmdetection and detectron2, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden
from dense_networks import backbone, canvas, nchw, padded_targets, two_devices
from vitpyramid import create_model
from vitpyramid.heads.detector import rescale
from vitpyramid.heads.masks import mask_targets, paste
from vitpyramid.heads.roi_align import level_of
from vitpyramid.weights.dense_names import from_state_dict, to_state_dict

EXACT = 1e-9
SLOTS = 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def options_of(meta: dict) -> dict:
    """Of `create_model`, from a file of either library."""
    if "test_cfg" in meta:
        proposals, test = meta["proposal_cfg"], meta["test_cfg"]
        return {
            "rpn_before": (proposals["nms_pre"],) * 2,
            "rpn_after": (proposals["max_per_img"],) * 2,
            "rpn_iou_threshold": proposals["nms"]["iou_threshold"],
            "rpn_samples": meta["rpn_sampler_num"],
            "roi_samples": meta["roi_sampler_num"],
            "finest_side": meta["finest_scale"] / 4,
            "score_threshold": test["score_thr"],
            "iou_threshold": test["iou_threshold"],
            "most_detections": test["max_per_img"],
        }
    return {
        "rpn_before": tuple(meta["pre_nms_topk"]),
        "rpn_after": tuple(meta["post_nms_topk"]),
        "rpn_samples": meta["rpn_batch"],
        "roi_samples": meta["roi_batch"],
        "finest_side": meta["canonical_box_size"] / 4 / 4,
        "score_threshold": meta["test"]["score"],
        "iou_threshold": meta["test"]["nms"],
        "most_detections": meta["test"]["topk"],
    }


def parts(model, images, targets, sizes, train):
    """What the stages make of images, on the way to the losses (`train`) or to detections."""
    levels = model.pyramid(images, train)
    objectness = model.rpn_head(levels)
    time = 0 if train else 1
    proposals = model.rpn_head.propose(objectness, levels, sizes, model.rpn_before[time], model.rpn_after[time])
    found = {"levels": levels, "objectness": objectness, "proposals": proposals}
    if not train:
        return found | {"detections": model.roi_head.detect(model.read(levels), proposals, sizes)}
    regions = model.roi_head.regions(proposals, targets, None)
    logits, deltas = model.roi_head.boxes_of(model.read(levels), regions.boxes)
    unpacked = jnp.unpackbits(targets.masks, axis=-1, count=images.shape[2]).astype(bool)
    masks = int(model.roi_samples * model.positive_fraction)
    boxes = regions.boxes[:, :masks]
    pooled = model.roi_head.pool(model.read(levels), boxes, 14)
    return found | {
        "anchor_samples": model.rpn_head.samples_of(levels, targets, sizes, None)[0],
        "regions": regions,
        "pooled": model.roi_head.pool(model.read(levels), regions.boxes, 7),
        "logits": logits,
        "deltas": deltas,
        "mask_logits": model.roi_head.mask_head(pooled),
        "mask_targets": jax.vmap(functools.partial(mask_targets, side=28, width=images.shape[2]))(
            targets.masks, boxes, regions.match[:, :masks]
        ),
        "losses": model.losses(images, targets.replace(masks=unpacked), sizes, train),
    }


@pytest.mark.parametrize("stem", ["mask_rcnn_pvt", "mask_rcnn_rest"])
def test_original(stem):
    golden = DenseGolden(stem)
    meta, weights = golden.meta, golden.state_dict()
    rest = stem.endswith("rest")
    model = create_model(
        f"{stem}_small",
        backbone=backbone(meta),
        num_classes=meta["num_classes"],
        channels=meta["feat_channels"],
        fc_channels=meta["fc"],
        random_samples=False,
        dtype=jnp.float64,
        **options_of(meta),
    )
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), from_state_dict(model, weights))
    images, sizes = canvas(golden), np.array(meta["img_shapes"])
    targets = padded_targets(golden, SLOTS, masks=True)

    @jax.jit
    def evaluate(variables):
        return model.apply(variables, images, targets, sizes, False, method=parts)

    @jax.jit
    def train(params, others, images, targets, sizes):
        def loss(params):
            found, updated = model.apply(
                {"params": params, **others}, images, targets, sizes, True, method=parts, mutable=list(others)
            )
            return sum(value.sum() for value in found["losses"].values()), (found, updated)

        return jax.value_and_grad(loss, has_aux=True)(params)

    found = evaluate(variables)
    params = variables.pop("params")
    with two_devices() as split:
        (total, (learned, updated)), gradients = train(params, variables, *split((images, targets, sizes)))

    def check(key, value):
        error = golden.error(key, value)
        assert error < EXACT, (key, error)

    def scored(boxes, scores):
        return jnp.concatenate([boxes, scores[..., None]], axis=-1)

    names = [f"eval/p{i}" for i in range(2, 7)] if rest else [f"neck{i}" for i in range(5)]
    for name, level in zip(names, found["levels"], strict=True):
        check(name, nchw(level.x))
    if rest:
        proposals = found["proposals"]
        check("eval/proposals", scored(proposals.boxes, proposals.scores))
        assert (proposals.valid.sum(axis=1) == golden.array("eval/proposals/count")).all()
    else:
        proposals = learned["proposals"]
        check("proposals", scored(proposals.boxes, jax.nn.sigmoid(proposals.scores)))
        assert (proposals.valid.sum(axis=1) == golden.array("proposals/count")).all()
        for i, (level, logits, deltas) in enumerate(
            zip(found["levels"], found["objectness"].logits, found["objectness"].deltas, strict=True)
        ):
            check(f"rpn_cls{i}", nchw(logits.reshape(2, *level.x.shape[1:3], 3)))
            check(f"rpn_reg{i}", nchw(deltas.reshape(2, *level.x.shape[1:3], 12)))

    index, positive, valid = (np.asarray(x) for x in learned["anchor_samples"])
    chosen = [[(i, a) for i in range(2) for a in sorted(index[i][mask[i]])] for mask in (positive, valid & ~positive)]
    if rest:
        assert chosen[0] == [tuple(row) for row in golden.array("rpn/sampled_pos")]
        assert chosen[1] == [tuple(row) for row in golden.array("rpn/sampled_neg")]
    else:
        assert chosen[0] == [tuple(row) for row in golden.array("rpn/pos_index")]
        assert sorted(chosen[0] + chosen[1]) == [tuple(row) for row in golden.array("rpn/sampled_index")]

    regions = learned["regions"]
    assert regions.valid.all()
    rows = jnp.repeat(jnp.arange(2.0), regions.boxes.shape[1])[:, None]
    rois = regions.boxes.reshape(-1, 4)
    check("roi/rois", jnp.concatenate([rows, rois], axis=1))
    assert (regions.labels.ravel() == golden.array("roi/labels")).all()
    rule = model.level_rule
    assert (level_of(rois, 4, model.finest_side * 4, *rule) == golden.array("roi/levels")).all()
    positive = np.asarray(regions.positive)
    masks = [learned["mask_targets"][i][positive[i, :SLOTS]] for i in range(2)]
    if rest:
        assert all((masks[i] == golden.array(f"roi/mask_targets{i}")).all() for i in range(2))
    else:
        assert (np.concatenate(masks) == golden.array("roi/mask_targets")).all()
        flat = regions.boxes.shape[0] * regions.boxes.shape[1]
        check("roi/feats", nchw(learned["pooled"].reshape(flat, *learned["pooled"].shape[2:])))
        check("roi/cls_score", learned["logits"].reshape(flat, -1))
        check("roi/bbox_pred", learned["deltas"].reshape(flat, -1))
        of_positives = learned["mask_logits"][positive[:, :SLOTS]]
        check("roi/mask_pred", nchw(of_positives))

    same = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_bbox": "loss_rpn_loc"} if rest else {}
    same |= {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg", "loss_mask": "loss_mask"} if rest else {}
    for key, value in learned["losses"].items():
        if rest:
            check(f"loss/{same[key]}", value.sum()[None])
        else:
            check(f"loss/{key}" if "rpn" in key else f"loss/roi_{key}", value)
    check("loss/total", total[None])
    found_gradients = to_state_dict(model, {"params": gradients, **updated})
    errors = golden.gradient_errors(found_gradients, weights)
    assert max(errors.values()) < EXACT, errors

    detections = found["detections"]
    originals = np.array(meta["ori_shapes"])
    factors = sizes / originals
    rescaled = rescale(detections, *((factors, originals) if rest else (factors.astype(np.float32),)))
    for key, of in (("det", detections), ("det_rescaled", rescaled)):
        if f"{key}/count" in golden.data:
            assert (of.valid.sum(axis=1) == golden.array(f"{key}/count")).all()
            assert (of.labels == golden.array(f"{key}/labels")).all()
            check(f"{key}/boxes_scores", scored(of.boxes, of.scores))
    if rest:
        check("det/mask_probs", detections.masks.reshape(-1, 1, 28, 28))
    for i in range(2):
        pasted = paste(detections.masks[i], rescaled.boxes[i], originals[i])
        assert (pasted == golden.array(f"det_rescaled/masks{i}")).all()
        if not rest:
            soft = paste(detections.masks[i], rescaled.boxes[i], originals[i], threshold=None)
            check(f"det_rescaled/soft_masks{i}", soft)
