"""Detectors in training: random samples, images without anything, half precision; and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_networks import two_devices
from harness import random_images, random_variables
from toy_family import Toy
from vitpyramid import create_model
from vitpyramid.heads.detector import Targets

OPTIONS = {"channels": 8, "num_classes": 3, "dtype": jnp.bfloat16}
DETR = {"heads": 2, "ffn_channels": 16, "encoder_layers": 1, "decoder_layers": 1, "queries": 6, "remat": True}
MASK_RCNN = {"fc_channels": 8, "rpn_before": (30, 20), "rpn_after": (20, 10), "rpn_samples": 16, "roi_samples": 8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("retinanet_rest_small", {"images_per_group": 1}),
        ("mask_rcnn_pvt_tiny", MASK_RCNN),
        ("detr_pvt_small", DETR),
        ("deformable_detr_two_stage_pit_s", DETR | {"channels": 32, "feature_levels": 3}),
    ],
)
def test_an_image_without_objects(name, options):
    """Losses and gradients are finite, at least float32, and of padded slots nothing depends on what they hold."""
    model = create_model(name, backbone=Toy(8, image_size=64), **OPTIONS | options)
    images = jnp.asarray(random_images(2, 64, 96))
    sizes = np.array([[64, 90], [50, 96]])
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0, :2] = [[4, 6, 40, 50], [30, 10, 90, 60]]
    valid = np.array([[True, True, False], [False] * 3])
    masks = np.zeros((2, 3, 64, 96), bool)
    masks[0, :, 10:40] = True

    variables = random_variables(model)
    if name.startswith("retinanet"):
        variables["batch_stats"]["loss_normaliser"] = np.float32(100)
    others = {key: value for key, value in variables.items() if key != "params"}

    @jax.jit
    def step(params, boxes, key):
        targets = Targets(boxes, jnp.ones((2, 3), jnp.int32), jnp.asarray(valid), jnp.asarray(masks))

        def loss(params):
            found, updated = model.apply(
                {"params": params, **others},
                images,
                targets,
                sizes,
                method="losses",
                rngs={"dropout": key},
                mutable=list(others),
            )
            return sum(value.sum() for value in found.values()), (found, updated)

        (_, (found, updated)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        finite = jax.tree.reduce(lambda a, b: a & b, jax.tree.map(lambda g: jnp.isfinite(g).all(), gradients))
        return found, updated, finite

    found, updated, finite = step(variables["params"], boxes, jax.random.key(1))
    assert finite and all(value.dtype == jnp.float32 and jnp.isfinite(value).all() for value in found.values())
    assert all(value.sum() > 0 for value in found.values())
    garbage = np.where(valid[..., None], boxes, np.nan)
    again, *_ = step(variables["params"], garbage, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, again))
    if not name.startswith("retinanet"):
        other, *_ = step(variables["params"], boxes, jax.random.key(2))
        assert any((found[key] != other[key]).any() for key in found)  # other samples, other dropout
    else:
        # Of each image by itself: the second has none, and counts as one.
        normaliser = float(updated["batch_stats"]["loss_normaliser"])
        positives = (normaliser - 90) / 0.1 * 2 - 1
        assert positives > 1 and abs(positives - round(positives)) < 1e-2


@pytest.mark.parametrize("name", ["retinanet_pvt_micro", "mask_rcnn_pvt_micro"])
def test_several_devices_detect(name):
    """The program is traced alone: more anchors than candidates, which are chosen on each device."""
    model = create_model(name, image_size=64)
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with two_devices():
        found = jax.eval_shape(lambda *args: model.apply(*args, method="detect"), variables, images, np.ones((2, 2)))
    assert found.boxes.shape == (2, model.most_detections, 4)
