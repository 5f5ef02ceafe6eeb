"""State dicts in other libraries' names, and by what names a network is recognised."""

import re

import numpy as np
import pytest
from flax import traverse_util

from harness import random_state_dict
from test_import_weights import prefixed, pvt
from vitpyramid import create_model
from vitpyramid.models.registry import list_models
from vitpyramid.weights import names
from vitpyramid.weights.containers import open_contents
from vitpyramid.weights.dense_names import torch_shapes
from vitpyramid.weights.importer import import_weights, recognise


def test_timm_names_of_pit():
    official = random_state_dict("pit_ti_distilled", 10, 64)
    for shift, names_found in ((1, "timm >= 0.9"), (0, "timm <= 0.8")):
        timm = {
            re.sub(r"^pools\.(\d)", lambda match, s=shift: f"transformers.{int(match[1]) + s}.pool", key): array
            for key, array in official.items()
        }
        contents = open_contents(timm)
        assert contents.names == names_found
        assert contents.state_dict.keys() == official.keys()
        for key, array in contents.state_dict.items():
            assert array is official[key]
            assert timm[contents.origin[key]] is array


def hugging_face_name(key: str) -> str:
    """HuggingFace's name of an official PVT key; `attn.kv` must have been split before."""
    rules = [
        (r"^head\.", "classifier."),
        (r"^norm\.", "pvt.encoder.layer_norm."),
        (r"^cls_token$", "pvt.encoder.patch_embeddings.3.cls_token"),
        (r"^pos_embed(\d)$", "pvt.encoder.patch_embeddings.{s}.position_embeddings"),
        (r"^patch_embed(\d)\.proj\.", "pvt.encoder.patch_embeddings.{s}.projection."),
        (r"^patch_embed(\d)\.norm\.", "pvt.encoder.patch_embeddings.{s}.layer_norm."),
        (r"^block(\d)\.", "pvt.encoder.block.{s}."),
    ]
    for pattern, name in rules:
        if match := re.match(pattern, key):
            key = name.format(s=int(match[1]) - 1 if match.groups() else "") + key[match.end() :]
            break
    inside = {"norm1": "layer_norm_1", "norm2": "layer_norm_2", "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2"}
    attention = {"q": "self.query", "k": "self.key", "v": "self.value", "sr": "self.sequence_reduction"}
    attention |= {"norm": "self.layer_norm", "proj": "output.dense"}
    for old, new in {**inside, **{f"attn.{old}": f"attention.{new}" for old, new in attention.items()}}.items():
        key = re.sub(rf"(block\.\d\.\d+)\.{re.escape(old)}\.", rf"\1.{new}.", key)
    return key


def test_hugging_face_names_of_pvt():
    theirs = {}
    for key, array in pvt().items():
        if ".attn.kv." in key:
            (
                theirs[hugging_face_name(key.replace(".kv.", ".k."))],
                theirs[hugging_face_name(key.replace(".kv.", ".v."))],
            ) = np.split(array, 2)
        else:
            theirs[hugging_face_name(key)] = array
    assert "pvt.encoder.block.1.0.attention.self.sequence_reduction.weight" in theirs
    assert not any(key.startswith(("block", "head", "pos")) for key in theirs)
    contents = open_contents(theirs)
    assert contents.names == "HuggingFace"
    assert contents.state_dict.keys() == pvt().keys()
    for key, array in contents.state_dict.items():
        np.testing.assert_array_equal(array, pvt()[key])
    assert contents.origin["block1.0.attn.kv.bias"].count(" + ") == 1
    # `PvtModel`, which has no prefix and no head; in Lightning's wrapping.
    headless = {f"model.{key.removeprefix('pvt.')}": array for key, array in theirs.items() if "classifier" not in key}
    headless = open_contents(headless)
    assert (headless.prefix, headless.names) == ("model.", "HuggingFace")
    assert headless.state_dict.keys() == {key for key in pvt() if not key.startswith("head.")}
    assert open_contents(prefixed("model.", theirs)).state_dict.keys() == pvt().keys()


# Hugging Face's names of DeiT, of transformers 4 and 5.
DEIT = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("norm.", "layernorm."),
)
DEIT_BLOCKS = {
    4: (
        ("blocks.", "encoder.layer."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."),
        (".attn.q.", ".attention.attention.query."),
        (".attn.k.", ".attention.attention.key."),
        (".attn.v.", ".attention.attention.value."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ),
    5: (
        ("blocks.", "layers."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.o_proj."),
        (".attn.q.", ".attention.q_proj."),
        (".attn.k.", ".attention.k_proj."),
        (".attn.v.", ".attention.v_proj."),
    ),
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ["deit_micro", "deit_tiny_distilled"])
def test_hugging_face_names_of_deit(name, version):
    ours = random_state_dict(name, 10, 32)
    split = {}
    for key, array in ours.items():
        parts = dict(zip("qkv", np.split(array, 3), strict=True)) if ".attn.qkv." in key else {"qkv": array}
        split |= {key.replace(".qkv.", f".{part}."): values for part, values in parts.items()}
    distilled = "dist_token" in ours
    body, heads = {}, {}
    for key, array in split.items():
        for old, new in (*DEIT, *DEIT_BLOCKS[version]):
            key = key.replace(old, new) if old.startswith(".") or key.startswith(old) else key
        if key.startswith("head"):
            key = key.replace("head_dist.", "distillation_classifier.")
            heads[key.replace("head.", "cls_classifier." if distilled else "classifier.")] = array
        else:
            body[key] = array
    around = "deit." if distilled else "vit."
    contents = open_contents({**prefixed(around, body), **heads})
    assert (contents.names, contents.prefix, contents.ignored) == ("HuggingFace", "", [])
    assert contents.state_dict.keys() == ours.keys()
    for key, array in contents.state_dict.items():
        np.testing.assert_array_equal(array, ours[key])
    # `DeiTModel`, which has no prefix and no head.
    headless = open_contents({**body, "pooler.dense.weight": np.zeros((3, 3))})
    assert headless.ignored == ["pooler.dense.weight"]
    assert headless.state_dict.keys() == {key for key in ours if not key.startswith("head")}
    assert recognise({key: array.shape for key, array in headless.state_dict.items()}) == name


def torchvision_name(key: str) -> str:
    """torchvision's name of timm's for RegNetY."""
    if match := re.match(r"s(\d)\.b(\d+)\.(.*)", key):
        rest = match[3].replace("downsample.", "proj.").replace("se.", "f.se.")
        rest = re.sub(r"^conv(\d)", lambda found: f"f.{' abc'[int(found[1])]}", rest)
        key = f"trunk_output.block{match[1]}.block{match[1]}-{int(match[2]) - 1}.{rest}"
    return key.replace(".conv.", ".0.").replace(".bn.", ".1.").replace("head.fc.", "fc.")


def test_torchvision_names_of_regnet():
    ours = random_state_dict("regnety_micro")
    theirs = {torchvision_name(key): array for key, array in ours.items()}
    inside = (
        "proj.0.weight",
        "proj.1.running_var",
        "f.a.0.weight",
        "f.b.1.bias",
        "f.se.fc1.bias",
        "f.c.1.running_mean",
    )
    expected = {"stem.0.weight", "stem.1.bias", "fc.bias", *(f"trunk_output.block1.block1-0.{key}" for key in inside)}
    assert expected <= theirs.keys()
    contents = open_contents(theirs)
    assert contents.names == "torchvision"
    assert contents.state_dict.keys() == ours.keys()
    assert all(array is ours[key] for key, array in contents.state_dict.items())
    assert recognise({key: array.shape for key, array in ours.items()}) == "regnety_micro"


def test_two_keys_for_one_parameter_are_an_error():
    ours = random_state_dict("regnety_micro")
    theirs = {torchvision_name(key): array for key, array in ours.items()}
    with pytest.raises(ValueError, match=r"stem\.conv\.weight and stem\.0\.weight both stand for stem\.conv\.weight"):
        open_contents({**theirs, "stem.conv.weight": ours["stem.conv.weight"]})


def mmdetection_name(key: str) -> str:
    """MMDetection's name of an official PVT key."""
    match = re.match(r"(pos_embed|patch_embed|block)(\d)(?:\.(\d+))?\.?(.*)", key)
    stage, block = int(match[2]) - 1, int(match[3] or 0) + 1
    rest = match[4].replace("attn.proj.", "attn.attn.out_proj.")
    rest = rest.replace("mlp.fc1.", "ffn.layers.0.").replace("mlp.fc2.", "ffn.layers.3.")
    if match[1] == "patch_embed":
        return f"layers.{stage}.0.{match[4].replace('proj.', 'projection.')}"
    return f"layers.{stage}.1.0.pos_embed" if match[1] == "pos_embed" else f"layers.{stage}.1.{block}.{rest}"


def mmdetection_backbone() -> dict:
    """The backbone of a detector as MMDetection has it."""
    theirs = {}
    for key, array in pvt().items():
        if key.startswith(("head.", "norm.", "cls_token")) or ".attn.kv." in key:
            continue
        name = mmdetection_name(key)
        if ".attn.q." in key:
            array = np.concatenate([array, pvt()[key.replace(".q.", ".kv.")]])
            name = name.replace("attn.q.", "attn.attn.in_proj_")
        if ".mlp.fc" in key and key.endswith("weight"):
            array = array[:, :, None, None]
        theirs[f"backbone.{name}"] = array[:, 1:] if key == "pos_embed4" else array
    return theirs


def test_mmdetection_names_of_pvt():
    theirs = mmdetection_backbone()
    assert "backbone.layers.2.1.1.attn.attn.in_proj_bias" in theirs
    contents = open_contents({"state_dict": theirs, "meta": {}})
    assert contents.names == "MMDetection"
    params = import_weights(contents, allow=("missing",)).variables["params"]
    expected = import_weights(open_contents(pvt())).variables["params"]
    for stage in range(1, 5):
        for part in (f"block{stage}_0", f"patch_embed{stage}"):
            for path, array in traverse_util.flatten_dict(expected[part]).items():
                np.testing.assert_array_equal(traverse_util.flatten_dict(params[part])[path], array)
    np.testing.assert_array_equal(params["pos_embed4"][:, 1:], expected["pos_embed4"][:, 1:])


def test_mmdetection_names_of_pvt_below_heads():
    model = create_model("retinanet_pvt_micro", num_classes=4, image_size=32)
    rng, shapes = np.random.default_rng(0), torch_shapes(model)
    heads = {key: rng.standard_normal(shape) for key, shape in shapes.items() if not key.startswith("backbone.")}
    contents = open_contents({"state_dict": heads | mmdetection_backbone()}, name="retinanet_pvt_micro")
    assert contents.ignored == []
    assert contents.origin["backbone.block3.0.attn.q.bias"] == "backbone.layers.2.1.1.attn.attn.in_proj_bias"
    network, variables, notes = import_weights(contents, "retinanet_pvt_micro")
    assert create_model(**network) == model and notes == {"initialised": ["backbone.pos_embed4[:, 0]"]}
    params = variables["params"]
    kernel = params["backbone"]["block3_0"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel, pvt()["block3.0.attn.q.weight"].T)
    bias = heads["bbox_head.retina_cls.bias"].astype(np.float32)
    np.testing.assert_array_equal(params["bbox_head"]["retina_cls"]["bias"], bias)


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.bottom_up."])
def test_detectors(prefix):
    without = {key: array for key, array in pvt().items() if not key.startswith(("head.", "norm.", "cls_token"))}
    without["pos_embed4"] = without["pos_embed4"][:, 1:]
    content = {"state_dict": {**prefixed(prefix, without), "neck.conv.weight": np.zeros(3)}, "meta": {}}
    contents = open_contents(content)
    with pytest.raises(ValueError, match=r"missing \(5\)"):
        import_weights(contents, "pvt_micro")
    converted = import_weights(contents, num_classes=7, allow=("missing",))
    assert converted.network["name"] == "pvt_micro"
    assert converted.notes["ignored"] == ["neck.conv.weight"]
    absent = ["cls_token", "head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert converted.notes["initialised"] == [*absent, "pos_embed4[:, 0]"]
    params = converted.variables["params"]
    np.testing.assert_array_equal(params["pos_embed4"][:, 1:], pvt()["pos_embed4"][:, 1:])
    np.testing.assert_array_equal(params["pos_embed4"][:, 0], 0)
    assert params["head"]["kernel"].shape == (256, 7)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_recognised(name):
    shapes = {key: array.shape for key, array in empty_state_dict(name).items()}
    if name in ("t2t_vit_14", "t2t_vit_14_resnext"):
        with pytest.raises(ValueError, match="t2t_vit_14, t2t_vit_14_resnext equally well: --model"):
            recognise(shapes)
    else:
        assert recognise(shapes) == name


def empty_state_dict(name: str) -> dict:
    """Arrays of the right shapes that take no memory, for 17 classes."""
    shapes = names.in_torch(names.model_shapes(name, 17, 224))
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def test_other_keys_are_not_recognised():
    with pytest.raises(ValueError, match=r"no model is known by these keys: layer4\.weight"):
        recognise({"layer4.weight": (3, 3)})
