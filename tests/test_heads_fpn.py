"""The feature pyramid against mmdetection's, in float64; and every head on every kind of backbone."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_golden import DenseGolden, tensor
from dense_networks import nchw
from harness import NARROW
from vitpyramid import create_model, list_models
from vitpyramid.heads.fpn import FPN, enlarge
from vitpyramid.models.backbone import Level
from vitpyramid.weights import names

EXACT = 1e-9


@pytest.mark.parametrize("stem", ["fpn_retinanet", "fpn_maskrcnn"])
def test_original(stem):
    golden = DenseGolden(stem)
    config, weights, seed = golden.meta["config"], golden.state_dict(), golden.meta["seed"]
    begin = config.get("start_level", 0)
    extra = config["num_outs"] - (len(config["in_channels"]) - begin)
    with jax.enable_x64(True):
        model = FPN(config["out_channels"], extra, pool="add_extra_convs" not in config, dtype=jnp.float64)
        inputs = [jnp.asarray(golden.input(name).transpose(0, 2, 3, 1), jnp.float64) for name in golden.meta["inputs"]]
        shapes = jax.eval_shape(model.init, jax.random.key(0), [Level(x, 1) for x in inputs[begin:]])
        paths = traverse_util.flatten_dict(shapes)
        keys = {path: re.sub(r"(\.\d+)\.", r"\1.conv.", names.torch_name(path)) for path in paths}
        params = {path: jnp.asarray(names.from_torch(path, weights[key]), jnp.float64) for path, key in keys.items()}

        @jax.jit
        def gradient(params, inputs):
            def loss(params, inputs):
                levels = [Level(x, 4 * 2**i) for i, x in enumerate(inputs)]
                outs = model.apply(traverse_util.unflatten_dict(params), levels[begin:])
                outs = [out.x.transpose(0, 3, 1, 2) for out in outs]
                cotangents = [tensor(seed, f"cotangent{i}", out.shape) for i, out in enumerate(outs)]
                return sum((out * c).sum() for out, c in zip(outs, cotangents, strict=True)), outs

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, inputs)

        (loss, outs), (of_params, of_inputs) = gradient(params, inputs)
    assert len(outs) == config["num_outs"]
    assert all(golden.error(f"out{i}", out) < EXACT for i, out in enumerate(outs))
    assert golden.error("loss", loss[None]) < EXACT
    for i, of_input in enumerate(of_inputs):
        assert (not of_input.any()) if i < begin else golden.error(f"grad_input{i}", nchw(of_input)) < EXACT
    found = {key: np.asarray(of_params[path]).transpose(_torch_axes(path)) for path, key in keys.items()}
    assert max(golden.gradient_errors(found, weights).values()) < EXACT


def _torch_axes(path):
    return names.torch_axes(path, 4 if path[-1] == "kernel" else 1)


def test_levels_of_any_size_are_enlarged():
    x = jnp.arange(3 * 4.0).reshape(1, 3, 4, 1)
    found = enlarge(x, (5, 8))[0, :, :, 0]
    np.testing.assert_array_equal(found, np.arange(12).reshape(3, 4)[[0, 0, 1, 1, 2]].repeat(2, axis=1))


# Of the configurations of PVT's repository, built by the original code.
PUBLISHED = {
    "retinanet_pvt_tiny": 22_964_724,
    "retinanet_pvt_small": 34_221_300,
    "mask_rcnn_pvt_small": 44_138_736,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_networks(name):
    shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    # The row of the last position table that was the class token's is of no use, but in the files.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PUBLISHED[name]


def test_names():
    found = [name for name in list_models() if name.startswith(("retinanet_", "mask_rcnn_", "semantic_fpn_"))]
    sizes = {"pvt": ("tiny", "small", "medium", "large"), "rest": ("small", "base", "large")}
    expected = [f"{head}_{f}_{size}" for head in ("retinanet", "mask_rcnn") for f in sizes for size in sizes[f]]
    expected += [f"semantic_fpn_pvt_{size}" for size in sizes["pvt"]]
    assert found == expected + [f"{head}_pvt_micro" for head in ("retinanet", "mask_rcnn", "semantic_fpn")]
    with pytest.raises(ValueError, match="unknown model 'retinanet_pvt_smal'.*retinanet_pvt_small"):
        create_model("retinanet_pvt_smal")
    with pytest.raises(ValueError, match="unknown model 'pit'"):
        create_model("retinanet_pvt_small", backbone="pit")
    with pytest.raises(TypeError, match="pvt_tiny has no option 'backbone'"):
        create_model("pvt_tiny", backbone="pit_s")
    with pytest.raises(TypeError, match="retinanet_pvt_tiny has no option 'chanels'"):
        create_model("retinanet_pvt_tiny", chanels=3)
    with pytest.raises(ValueError, match="num_classes = 0: expected"):
        create_model("retinanet_pvt_tiny", num_classes=0)
    model = create_model("semantic_fpn_pvt_small", backbone="pit_s", drop_path_rate=0.2, dtype=jnp.bfloat16)
    assert model.backbone.drop_path_rate == 0.2 and model.backbone.dtype == model.dtype == jnp.bfloat16
    assert create_model("mask_rcnn_rest_base").backbone.drop_path_rate == 0.2


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("retinanet_rest_small", "pit"),
        ("retinanet_rest_small", "t2t"),
        ("mask_rcnn_pvt_tiny", "pit_distilled"),
        ("mask_rcnn_pvt_tiny", "deit"),
        ("semantic_fpn_pvt_tiny", "rest"),
        ("semantic_fpn_pvt_tiny", "t2t_dense"),
        ("semantic_fpn_pvt_tiny", "regnety"),
    ],
)
def test_every_head_on_every_backbone(head, kind):
    """Shapes of all levels and outputs, at a size that no stride divides."""
    model = create_model(head, backbone=NARROW[kind], channels=16, num_classes=3)
    images = jax.ShapeDtypeStruct((2, 75, 101, 3), jnp.float32)
    both = functools.partial(nn.Module.init_with_output, model, method=lambda m, x: (m.pyramid(x), m(x)))
    (levels, out), _ = jax.eval_shape(both, jax.random.key(0), images)
    read = [model.backbone.strides[i] for i in model.levels]
    assert [level.stride for level in levels][: len(read)] == read
    assert all(level.stride == 2 * before.stride for before, level in itertools.pairwise(levels[len(read) - 1 :]))
    assert all(level.x.shape[-1] == 16 for level in levels)
    if head.startswith("semantic"):
        assert out.shape == (*levels[0].x.shape[:3], 3)
    else:
        assert out.boxes.shape == (2, 100, 4) and out.valid.shape == (2, 100)
        assert (out.masks is None) == head.startswith("retinanet")
