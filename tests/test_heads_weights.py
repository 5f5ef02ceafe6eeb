"""Weights of networks for dense prediction: by registered name, from a checkpoint, from a classifier."""

import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from dense_golden import DenseGolden
from dense_networks import backbone
from harness import NARROW, random_variables
from vitpyramid import create_model
from vitpyramid.weights.dense_names import from_state_dict, network_of, to_state_dict, torch_shapes
from vitpyramid.weights.dense_start import from_classifier


@pytest.mark.parametrize("name", ["retinanet_rest_small", "mask_rcnn_pvt_tiny", "semantic_fpn_pvt_tiny"])
def test_classes_and_size_are_taken_from_the_weights(name):
    shapes = torch_shapes(create_model(name, num_classes=7, image_size=64))
    size = 64 if "pvt" in name else 224
    own = {"name": name, "backbone": ""}
    assert network_of(name, shapes) == own | {"num_classes": 7, "image_size": size}
    assert network_of(name, {}) == own | {"num_classes": create_model(name).num_classes, "image_size": 224}


def test_round_trip_and_wrong_keys():
    """Every array comes back, detectron2's buffers are passed over, and what does not fit is named."""
    golden = DenseGolden("mask_rcnn_rest")
    meta, weights = golden.meta, golden.state_dict()
    model = create_model(
        "mask_rcnn_rest_small", backbone=backbone(meta), channels=meta["feat_channels"], fc_channels=20, num_classes=5
    )
    buffers = {
        "pixel_mean": np.zeros((3, 1, 1)),
        "proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4)),
    }
    back = to_state_dict(model, from_state_dict(model, weights | buffers))
    assert back.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    wrong = {key: array for key, array in weights.items() if key != "roi_heads.box_head.fc1.bias"}
    wrong["roi_heads.box_head.fc1.weight"] = np.zeros((20, 10))
    expected = "missing (1):\n  roi_heads.box_head.fc1.bias\nwrong shape (1):\n  roi_heads.box_head.fc1.weight (20, 10)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        from_state_dict(model, wrong)


def test_from_a_classifier():
    """PVT's head, norm and class token are left over; the heads begin as their papers say."""
    classifier = random_variables(NARROW["pvt"])
    model = create_model("retinanet_pvt_tiny", backbone=NARROW["pvt"], channels=16, num_classes=3)
    variables, unused, initialised = from_classifier(model, classifier)
    rest = {path.split("/")[2] for path in unused}
    assert rest == {"head", "norm", "cls_token"}
    assert {path.split("/")[1] for path in initialised} == {"neck", "bbox_head"}
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    np.testing.assert_array_equal(params["backbone/pos_embed4"], classifier["params"]["pos_embed4"])
    np.testing.assert_allclose(params["bbox_head/retina_cls/bias"], -np.log(99), rtol=1e-6)
    assert 0.009 < np.std(params["bbox_head/cls_convs_0/kernel"]) < 0.011
    bound = np.sqrt(6 / (9 * 16 + 9 * 16))
    largest = np.abs(params["neck/fpn_convs_0/kernel"]).max()
    assert 0.95 * bound < largest <= bound
    with pytest.raises(ValueError, match="nothing of these weights fits the backbone, a PVT"):
        from_classifier(model, {"params": {"stem": {"kernel": np.zeros(3)}}})


def test_initial_values_of_regions():
    """Of Mask R-CNN's fully connected layer, whose kernel is of a whole region; its fans are those of a matrix."""
    model = create_model("mask_rcnn_pvt_tiny", backbone=NARROW["pvt"], channels=4, fc_channels=16, num_classes=3)

    def layer():
        params = model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"]
        return params["roi_head"]["bbox_head"]["shared_fcs_0"]["kernel"]

    kernel = np.asarray(jax.jit(layer)())
    assert kernel.shape == (7, 7, 4, 16)
    bound = np.sqrt(6 / (7 * 7 * 4 + 16))
    assert 0.95 * bound < np.abs(kernel).max() <= bound
