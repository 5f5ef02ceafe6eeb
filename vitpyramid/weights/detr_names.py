"""Names of detectors with transformers: ours are the authors', mmdetection's and HuggingFace's are made of them.

HuggingFace has the projections of queries, keys and values as arrays of their own, the others have them as one.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from vitpyramid.heads.deformable_detr import DeformableDETR
from vitpyramid.heads.network import DenseNetwork

BACKBONES = {
    "facebookresearch": "backbone.0.body.",
    "fundamentalvision": "backbone.0.body.",
    "mmdetection": "backbone.",
    "huggingface": "model.backbone.conv_encoder.model.",
}
# What is replaced in our names of what stands on it, in this order.
RULES = {
    "facebookresearch": ((r"\.in_proj\.", ".in_proj_"),),
    "mmdetection": (
        (r"^", "bbox_head."),
        (r"\.in_proj\.", ".in_proj_"),
        (r"\.self_attn\.", ".attentions.0.attn."),
        (r"\.multihead_attn\.", ".attentions.1.attn."),
        (r"\.layers\.(\d+)\.linear1\.", r".layers.\1.ffns.0.layers.0.0."),
        (r"\.layers\.(\d+)\.linear2\.", r".layers.\1.ffns.0.layers.1."),
        (r"\.norm(\d)\.", lambda found: f".norms.{int(found[1]) - 1}."),
        (r"\.decoder\.norm\.", ".decoder.post_norm."),
        (r"\.class_embed\.", ".fc_cls."),
        (r"\.bbox_embed\.layers\.0\.", ".reg_ffn.layers.0.0."),
        (r"\.bbox_embed\.layers\.1\.", ".reg_ffn.layers.1."),
        (r"\.bbox_embed\.layers\.2\.", ".fc_reg."),
        (r"\.query_embed\.", ".query_embedding."),
    ),
    "huggingface": (
        (r"^transformer\.", "model."),
        (r"\.multihead_attn\.", ".encoder_attn."),
        (r"\.linear([12])\.", r".fc\1."),
        (r"\.norm1\.", ".self_attn_layer_norm."),
        (r"(\.encoder\..*)\.norm2\.", r"\1.final_layer_norm."),
        (r"(\.decoder\..*)\.norm2\.", r"\1.encoder_attn_layer_norm."),
        (r"\.norm3\.", ".final_layer_norm."),
        (r"\.decoder\.norm\.", ".decoder.layernorm."),
        (r"^class_embed\.", "class_labels_classifier."),
        (r"^bbox_embed\.", "bbox_predictor."),
        (r"^query_embed\.", "model.query_position_embeddings."),
        (r"^input_proj\.", "model.input_projection."),
    ),
}
# The same for Deformable DETR, whose decoder has its norms in another order.
DEFORMABLE_RULES = {
    "fundamentalvision": RULES["facebookresearch"],
    "huggingface": (
        (r"^transformer\.", "model."),
        (r"\.cross_attn\.", ".encoder_attn."),
        (r"\.linear([12])\.", r".fc\1."),
        (r"(\.encoder\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"(\.encoder\..*)\.norm2\.", r"\1.final_layer_norm."),
        (r"\.norm1\.", ".encoder_attn_layer_norm."),
        (r"\.norm2\.", ".self_attn_layer_norm."),
        (r"\.norm3\.", ".final_layer_norm."),
        (r"^query_embed\.", "model.query_position_embeddings."),
        (r"^input_proj\.", "model.input_proj."),
    ),
}
# Of its modules in memory since version 5, where its files kept their names.
_HUGGINGFACE_5 = (
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^(model\.(?:en|de)coder\..*)\.o_proj\.", r"\1.out_proj."),
    (r"^(model\.(?:en|de)coder\..*)\.mlp\.fc", r"\1.fc"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")


def renamed(name: str, model: DenseNetwork) -> str:
    """The name that the library of `model` has for ours."""
    if name.startswith("backbone."):
        return BACKBONES[model.library] + name.removeprefix("backbone.")
    rules = DEFORMABLE_RULES if isinstance(model, DeformableDETR) else RULES
    return _replaced(name, rules[model.library])


def twins(name: str, model: DenseNetwork) -> list[str]:
    """Our names under which files have the same array once more: of heads that layers share or that the decoder reads.

    Files of some versions have these alone.
    """
    if not isinstance(model, DeformableDETR) or not re.match(r"(class|bbox)_embed\.", name):
        return []
    if not model.refine:
        return [name.replace(".0.", f".{i}.", 1) for i in range(1, model.decoder_layers)]
    return [f"transformer.decoder.{name}"] if model.two_stage or name.startswith("bbox") else []


def _replaced(name: str, rules: tuple[tuple[str, str | Callable], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def join(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """HuggingFace's arrays with the three projections as one `in_proj`, where all are there."""
    arrays = {_replaced(key, _HUGGINGFACE_5): array for key, array in state_dict.items()}
    for key in [key for key in arrays if ".q_proj." in key]:
        parts = [key.replace("q_proj", part) for part in _PARTS]
        if all(part in arrays for part in parts):
            arrays[key.replace("q_proj", "in_proj")] = np.concatenate([arrays.pop(part) for part in parts])
    return arrays


def split(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `join`."""
    arrays = {}
    for key, array in state_dict.items():
        parts = np.split(array, 3) if ".in_proj." in key else [array]
        names = [key.replace("in_proj", part) for part in _PARTS] if len(parts) == 3 else [key]
        arrays |= zip(names, parts, strict=True)
    return arrays
