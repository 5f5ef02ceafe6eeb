"""Deformable DETR against its authors' numbers, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_golden import DenseGolden
from dense_networks import nchw, padded_targets
from harness import NARROW
from vitpyramid import create_model
from vitpyramid.heads import deformable_attention as attention
from vitpyramid.heads import deformable_detr, set_prediction
from vitpyramid.heads.boxes import from_centres
from vitpyramid.heads.deformable_detr import DeformableDETR
from vitpyramid.heads.detector import rescale
from vitpyramid.heads.transformer import padding_mask, sine_positions
from vitpyramid.models.backbone import Backbone, Level
from vitpyramid.weights.dense_names import from_state_dict, network_of, to_state_dict

EXACT = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("form", [attention.sample_by_gathers, attention.sample_by_products])
@pytest.mark.parametrize("stem", ["ms_deform_attn", "ms_deform_attn_ref4"])
def test_attention(stem, form, monkeypatch):
    """Also of cells that are padding."""
    golden = DenseGolden(stem)
    meta, weights = golden.meta, golden.state_dict()
    monkeypatch.setattr(attention, "sample", lambda *arrays: form(*arrays[:3], grids=arrays[3]))
    grids = tuple(map(tuple, meta["spatial_shapes"]))
    layer = attention.DeformableAttention(meta["heads"], len(grids), meta["points"], jnp.float64)
    query, value, cotangent = (
        jnp.asarray(golden.input(name), jnp.float64) for name in ("query", "input_flatten", "cotangent")
    )
    inside = ~golden.array("padding_mask") if "padding_mask/packed" in golden.data else None
    params = {}
    for name, array in weights.items():
        module, leaf = name.split(".")
        array = array.astype(np.float64)
        params.setdefault(module, {})[{"weight": "kernel"}.get(leaf, leaf)] = array.T

    @jax.jit
    def run(*inputs):
        def call(params, query, reference, value):
            return layer.apply({"params": params}, query, reference, value, grids, inside)

        out, backward = jax.vjp(call, *inputs)
        return out, backward(cotangent)

    out, (of_params, of_query, of_reference, of_value) = run(params, query, golden.array("reference_points"), value)
    assert golden.error("output", out) < EXACT
    assert golden.error("grad_query", of_query) < EXACT
    assert golden.error("grad_reference", of_reference) < EXACT
    assert golden.error("grad_input", of_value) < EXACT
    gradients = {
        f"{module}.{({'kernel': 'weight'}).get(leaf, leaf)}": np.asarray(array).T
        for module, leaves in of_params.items()
        for leaf, array in leaves.items()
    }
    errors = golden.gradient_errors(gradients, weights)
    assert max(errors.values()) < EXACT, errors


class Maps(Backbone, kw_only=True):
    """Stands for a backbone: its maps are parameters, and so have gradients."""

    shapes: tuple[tuple[int, ...], ...]

    strides = (8, 16, 32)
    stages = ()

    def setup(self):
        self.maps = [self.param(f"map{i}", nn.initializers.zeros, shape) for i, shape in enumerate(self.shapes)]

    def features(self, images, train=False):
        return tuple(Level(x, stride) for x, stride in zip(self.maps, self.strides, strict=False))


def network(meta, maps, **options) -> DeformableDETR:
    fields = {
        "num_classes": "num_classes",
        "channels": "hidden",
        "heads": "heads",
        "points": "points",
        "ffn_channels": "ffn",
        "encoder_layers": "enc_layers",
        "decoder_layers": "dec_layers",
        "feature_levels": "num_feature_levels",
        "queries": "num_queries",
    }
    options |= {field: meta[name] for field, name in fields.items()}
    below = Maps(shapes=tuple(x.shape for x in maps.values()))
    return DeformableDETR(backbone=below, levels=tuple(range(len(maps))), dtype=jnp.float64, **options)


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def targets_of(golden):
    """Ground truth, in more slots than there are boxes, and sizes of the images."""
    meta = golden.meta
    sizes = np.array(meta["img_shapes"])
    meta["gt_boxes"] = [
        np.asarray(from_centres(np.array(boxes) * [width, height, width, height]))
        for boxes, (height, width) in zip(meta["gt_boxes_cxcywh"], sizes, strict=True)
    ]
    return padded_targets(golden, 6), sizes


def check_gradients(golden, gradients, weights, maps):
    errors = golden.gradient_errors(gradients, weights)
    assert max(errors.values()) < EXACT, errors
    for i, key in enumerate(maps):
        assert golden.error(f"grad_features{i}", nchw(gradients[key])) < EXACT


# Losses by the originals' names: ours, and their weights.
PARTS = {"loss_ce": ("loss_cls", 2), "loss_bbox": ("loss_bbox", 5), "loss_giou": ("loss_giou", 2)}


@pytest.mark.parametrize("stem", ["deformable_detr", "deformable_detr_refine"])
def test_original(stem):
    """Outputs, matches, losses, gradients and detections, from the backbone's maps on."""
    golden = DenseGolden(stem)
    meta = golden.meta
    weights = golden.state_dict()
    maps = {f"backbone.0.body.map{i}": golden.input(f"features{i}").transpose(0, 2, 3, 1) for i in range(3)}
    model = network(meta, maps, refine=meta["with_box_refine"])
    variables = wide(from_state_dict(model, weights | maps))
    images = jnp.zeros((2, *meta["canvas"], 3))
    targets, sizes = targets_of(golden)

    @jax.jit
    def run(params):
        def loss(params):
            predictions = model.apply({"params": params}, images, sizes, method="predict")
            losses = model.losses_of(predictions, targets, sizes)
            return sum(value.sum() for value in losses.values()), (predictions, losses)

        (_, (predictions, losses)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        query = set_prediction.assign(
            predictions.logits, predictions.boxes, targets, sizes, focal=True, weights=deformable_detr.WEIGHTS
        )
        return predictions, losses, gradients, query, model.detections_of(predictions, sizes)

    predictions, losses, gradients, query, detections = run(variables["params"])
    assert golden.error("logits", predictions.logits) < EXACT
    assert golden.error("boxes", predictions.boxes) < EXACT
    layers = len(query)
    for layer in range(layers):
        for image in range(2):
            found = np.full(meta["num_queries"], -1)
            for slot in np.flatnonzero(targets.valid[image]):
                found[query[layer, image, slot]] = slot
            assert (found == golden.array(f"match/layer{layer}_image{image}")).all()
    for layer in range(layers):
        for theirs, (ours, weight) in PARTS.items():
            key = f"loss/{theirs}" if layer == layers - 1 else f"loss/{theirs}_{layer}"
            assert golden.error(key, losses[ours][layer, None] / weight) < EXACT, key
    total = sum(value.sum() for value in losses.values())
    assert golden.error("loss/total", total[None]) < EXACT
    check_gradients(golden, to_state_dict(model, {"params": gradients}), weights, maps)
    factors = sizes / np.array(meta["ori_shapes"])
    found = rescale(detections, factors)
    for key in ("boxes", "scores", "labels"):
        assert golden.error(f"det/{key}", getattr(found, key)) < EXACT, key


def test_two_stages():
    """Against HuggingFace's: proposals, what follows from them, losses, gradients; names in memory and in files."""
    golden = DenseGolden("deformable_detr_huggingface")
    meta, weights = golden.meta, golden.state_dict()
    maps = {
        f"model.backbone.conv_encoder.model.map{i}": golden.input(f"features{i}").transpose(0, 2, 3, 1)
        for i in range(2)
    }
    model = network(meta, maps, refine=True, two_stage=True, library="huggingface")
    variables = from_state_dict(model, weights | maps)
    back = to_state_dict(model, variables)
    assert back.keys() - maps.keys() == weights.keys() | {
        key.removeprefix("model.decoder.") for key in weights if "class_embed" in key or "bbox_embed" in key
    }
    in_memory = {key.replace(".out_proj.", ".o_proj.").replace(".fc", ".mlp.fc"): back[key] for key in back}
    assert set(meta["memory"]) <= in_memory.keys()
    again = from_state_dict(model, {key: in_memory[key] for key in [*meta["memory"], *maps]})
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), variables, again))
    with pytest.raises(ValueError, match=r"class_embed\.1\.bias differs from|differs from class_embed\.1\.bias"):
        from_state_dict(model, back | {"class_embed.1.bias": np.zeros(meta["num_classes"])})

    targets, sizes = targets_of(golden)
    images = jnp.zeros((2, *meta["canvas"], 3))

    @jax.jit
    def run(params):
        def loss(params):
            predictions = model.apply({"params": params}, images, sizes, method="predict")
            losses = model.losses_of(predictions, targets, sizes)
            return sum(value[-1] for value in losses.values()), (predictions, losses)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (predictions, losses)), gradients = run(wide(variables["params"]))
    proposed_logits, proposed_boxes = predictions.proposed
    # Cells beyond the image are no candidates, but have positions that are of no meaning in transformers' numbers too.
    assert golden.error("proposed/logits", proposed_logits) < EXACT
    assert golden.error("proposed/boxes", proposed_boxes) < EXACT
    assert golden.error("logits", predictions.logits[-1]) < EXACT
    assert golden.error("boxes", predictions.boxes[-1]) < EXACT
    for theirs, (ours, weight) in PARTS.items():
        for kind in ("", "_enc"):
            assert golden.error(f"loss/{theirs}{kind}", losses[f"{ours}{kind}"][-1:] / weight) < EXACT
    check_gradients(golden, to_state_dict(model, {"params": gradients}), weights, maps)


def test_names_say_classes_and_library():
    for library, prefix in (("fundamentalvision", ""), ("huggingface", "model.")):
        shapes = {f"{prefix}input_proj.0.0.bias": (64,), "class_embed.0.bias": (4,)}
        found = network_of("deformable_detr_pit_micro", shapes)
        assert found["num_classes"] == 4 and found.get("library", "fundamentalvision") == library
    found = network_of("deformable_detr_two_stage_pit_s", {"transformer.decoder.class_embed.0.bias": (5,)})
    assert found["num_classes"] == 5


@pytest.mark.parametrize(("below", "levels"), [("t2t_vit_7", (0,)), ("rest_lite", (1, 2, 3))])
def test_other_backbones(below, levels):
    """Of one level, which coarser ones are made of, and of four, of which the finest is left out."""
    small = {"queries": 5, "encoder_layers": 1, "decoder_layers": 2, "num_classes": 3}
    model = create_model("deformable_detr_pit_s", backbone=below, **small)
    assert model.levels == levels
    images = jnp.zeros((2, 72, 100, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert set(variables["params"]) == {"backbone", *model.after}
    found = jax.eval_shape(lambda variables: model.apply(variables, images, method="predict"), variables)
    assert found.logits.shape == (2, 2, 5, 3) and found.boxes.shape == (2, 2, 5, 4)
    assert found.logits.dtype == jnp.float32


def test_initial_values():
    """Biases, which the authors set: places around a cell, small boxes, classes that are hardly there."""
    options = {"channels": 32, "queries": 5, "encoder_layers": 1, "decoder_layers": 2, "num_classes": 3}
    model = create_model("deformable_detr_refine_pit_s", backbone=NARROW["pit"], **options)
    with jax.enable_x64(False):
        params = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))()["params"]
    attention_of = params["transformer"]["encoder"]["layers_0"]["self_attn"]
    offsets = attention_of["sampling_offsets"]["bias"].reshape(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = np.array(directions)[:, None, None] * np.arange(1, 5)[:, None]
    np.testing.assert_allclose(offsets, np.broadcast_to(expected, offsets.shape), atol=1e-6)
    assert not np.any(attention_of["sampling_offsets"]["kernel"]) and not np.any(attention_of["output_proj"]["bias"])
    for i, side in enumerate((-2, 0)):
        np.testing.assert_allclose(params[f"class_embed_{i}"]["bias"], -np.log(99), rtol=1e-6)
        last = params[f"bbox_embed_{i}"]["layers_2"]
        assert last["bias"].tolist() == [0, 0, side, side] and not np.any(last["kernel"])
    with pytest.raises(ValueError, match="two_stage = True: expected refine = True"):
        jax.eval_shape(model.clone(refine=False, two_stage=True).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def test_positions_and_padding():
    """The masks of levels; positions where there is an image."""
    golden = DenseGolden("deformable_detr")
    meta = golden.meta
    for i, grid in enumerate(meta["feature_maps"]):
        padding = padding_mask(np.array(meta["img_shapes"]), tuple(meta["canvas"]), tuple(grid))
        assert (padding == golden.array(f"mask{i}")).all()
        positions = sine_positions(padding, meta["hidden"], jnp.float64, offset=-0.5)
        positions = jnp.where(padding[..., None], 0, positions)
        assert golden.error(f"pos{i}", nchw(positions)) < EXACT
