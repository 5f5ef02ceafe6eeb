"""From what a checkpoint file holds to a state dict in the papers' names.

Files hold state dicts inside training states, inside detectors, and in the names of other libraries:

    pvt_tiny.pth, pit_*.pth, rest_*.pth, timm   a state dict
    T2T-ViT *.pth.tar (timm's trainer)          state_dict_ema, state_dict, optimizer, args ...
    DeiT, PVT training output                   model, optimizer, args ...
    T2T-ViT transfer learning                   net, acc, epoch; keys begin with `module.`
    PVT, ResT detectors                         state_dict or model; keys begin with `backbone.`
    Lightning, AveragedModel, torch.compile     keys begin with `model.`, `module.`, `_orig_mod.`
    timm's PiT, HuggingFace's PVT and DeiT, MMDetection's PVT, torchvision's RegNetY: `DIALECTS`
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.models.registry import VARIANTS
from vitpyramid.weights import dense_names
from vitpyramid.weights.names import LISTED, torch_name
from vitpyramid.weights.pickles import brief

StateDict = dict[str, np.ndarray]

# Where state dicts lie in a training state, the preferred one first.
RAW = ("state_dict", "model", "net", "model_state_dict")
EMA = ("state_dict_ema",)
OTHER_EMA = ("model_ema", "ema")  # averages that their authors did not report: taken only when asked for
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of all keys, which say nothing
_BELOW = "backbone."
IGNORED = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")  # counters, no parameters


class Dialect(NamedTuple):
    """Names that another library has for a network.

    Attributes:
      names: of the library.
      anchors: keys of which every state dict of these names has one.
      rules: patterns and what takes their place, one after another, in each key.
      around: what keys begin with unless they are of a head, or the file has no head.
      joined: parts of attention that the papers have as one array.
    """

    names: str
    anchors: tuple[str, ...]
    rules: tuple[tuple[str, str | Callable], ...] = ()
    around: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()


DIALECTS = (
    Dialect(  # pooling inside the stages, behind the blocks ...
        "timm <= 0.8", ("transformers.0.pool.conv.weight",), ((r"^transformers\.(\d+)\.pool\.", r"pools.\1."),)
    ),
    Dialect(  # ... and before them
        "timm >= 0.9",
        ("transformers.1.pool.conv.weight",),
        ((r"^transformers\.(\d+)\.pool\.", lambda found: f"pools.{int(found[1]) - 1}."),),
    ),
    Dialect(
        "HuggingFace",
        ("encoder.patch_embeddings.0.projection.weight",),
        (
            (r"^pvt\.", ""),
            (r"^encoder\.patch_embeddings\.(\d)\.position_embeddings$", lambda found: f"pos_embed{int(found[1]) + 1}"),
            (r"^encoder\.patch_embeddings\.\d\.cls_token$", "cls_token"),
            (r"^encoder\.patch_embeddings\.(\d)\.", lambda found: f"patch_embed{int(found[1]) + 1}."),
            (r"^(patch_embed\d\.)projection\.", r"\1proj."),
            (r"^(patch_embed\d\.)layer_norm\.", r"\1norm."),
            (r"^encoder\.block\.(\d)\.", lambda found: f"block{int(found[1]) + 1}."),
            (r"\.layer_norm_(\d)\.", r".norm\1."),
            (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
            (r"\.attention\.self\.sequence_reduction\.", ".attn.sr."),
            (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
            (r"\.attention\.output\.dense\.", ".attn.proj."),
            (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
            (r"^encoder\.layer_norm\.", "norm."),
            (r"^classifier\.", "head."),
        ),
        around=("pvt.",),
        joined=("k", "v"),
    ),
    Dialect(  # DeiT's; the first forms are of transformers 4
        "HuggingFace",
        ("embeddings.patch_embeddings.projection.weight",),
        (
            (r"^(deit|vit)\.", ""),
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.cls_token$", "cls_token"),
            (r"^embeddings\.distillation_token$", "dist_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^(encoder\.layer|layers)\.", "blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.(attention\.(q|k|v)(uery|ey|alue)|(q|k|v)_proj)\.", r".attn.\2\4."),
            (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"\.output\.dense\.", ".mlp.fc2."),
            (r"^layernorm\.", "norm."),
            (r"^(cls_)?classifier\.", "head."),
            (r"^distillation_classifier\.", "head_dist."),
        ),
        around=("deit.", "vit."),
        joined=("q", "k", "v"),
    ),
    Dialect(
        "MMDetection",
        ("layers.0.0.projection.weight",),
        (
            (r"^layers\.(\d)\.1\.0\.pos_embed$", lambda found: f"pos_embed{int(found[1]) + 1}"),
            (r"^layers\.(\d)\.0\.(projection|norm)\.", lambda found: f"patch_embed{int(found[1]) + 1}.{found[2]}."),
            (r"\.projection\.", ".proj."),
            (r"^layers\.(\d)\.1\.(\d+)\.", lambda found: f"block{int(found[1]) + 1}.{int(found[2]) - 1}."),
            (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
            (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
            (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.3\.", ".mlp.fc2."),
        ),
    ),
    Dialect(
        "torchvision",
        ("trunk_output.block1.block1-0.proj.0.weight",),
        (
            (r"^trunk_output\.block\d\.block(\d)-(\d+)\.", lambda found: f"s{found[1]}.b{int(found[2]) + 1}."),
            (r"\.proj\.", ".downsample."),
            (r"\.f\.([abc])\.", lambda found: f".conv{'abc'.index(found[1]) + 1}."),
            (r"\.f\.se\.", ".se."),
            (r"^(stem|.*\.(?:conv\d|downsample))\.0\.", r"\1.conv."),
            (r"^(stem|.*\.(?:conv\d|downsample))\.1\.", r"\1.bn."),
            (r"^fc\.", "head.fc."),
        ),
    ),
    Dialect(
        "official", tuple({torch_name(("params", *v.model.signature.split("/"))): None for v in VARIANTS.values()})
    ),
)


class Contents(NamedTuple):
    """A state dict and how it was found.

    Attributes:
      state_dict: arrays by the papers' names.
      origin: the file's key by the papers' name (several joined by " + " where they became one).
      container: where the state dict lay, e.g. "state_dict_ema", "the file itself".
      prefix: what was before the names.
      names: of a `Dialect`.
      ignored: keys of the file that are no parameters, or none of a backbone.
    """

    state_dict: StateDict
    origin: dict[str, str]
    container: str
    prefix: str
    names: str
    ignored: list[str]


def open_contents(content: Any, weights: str = "auto", name: str | None = None) -> Contents:
    """Finds the state dict in what a checkpoint file holds and gives it the papers' names.

    Args:
      content: what `read_torch_file` returns.
      weights: "ema" or "raw" of a training state; "auto" takes `state_dict_ema` where there is one, which is what
        T2T-ViT's authors release, else the raw weights.
      name: of a network for dense prediction, for all of a detector; else what is taken of one is the backbone.

    Raises:
      ValueError: no state dict in it, or not the one asked for, or several; the message lists what there is.
    """
    container, found = _unwrap(content, weights)
    if name in DENSE:
        return _open_dense(container, found, name)
    dialect, prefix = _dialect(found)
    origin, state_dict, ignored = {}, {}, []
    for key, array in found.items():
        if not key.startswith(prefix) or IGNORED.search(key) or not isinstance(array, np.ndarray):
            ignored.append(key)
            continue
        name = key.removeprefix(prefix)
        for pattern, replacement in dialect.rules:
            name = re.sub(pattern, replacement, name)
        if name.startswith("pooler.") and dialect.joined:
            ignored.append(key)
        elif name in origin:
            raise ValueError(f"{container}: {brief(key)} and {brief(origin[name])} both stand for {brief(name)}")
        else:
            origin[name], state_dict[name] = key, array
    if dialect.joined:
        _join(state_dict, origin, dialect.joined)
    if dialect.names == "MMDetection":
        state_dict, origin = _split(state_dict, origin)
    return Contents(state_dict, origin, container, prefix, dialect.names, ignored)


def _open_dense(container: str, found: Mapping[str, Any], name: str) -> Contents:
    """All of a network for dense prediction, in the names of its library."""
    prefix = next((wrapper for wrapper in WRAPPERS if all(key.startswith(wrapper) for key in found)), "")
    own, ignored = {}, []
    for key, array in found.items():
        if dense_names.IGNORED.search(key.removeprefix(prefix)) or not isinstance(array, np.ndarray):
            ignored.append(key)
        else:
            own[key.removeprefix(prefix)] = array
    own, origin = _with_papers_backbone(own)
    model = dense_names.named_as(create_model(name), own)
    state_dict = dense_names.in_one_form(model, own)
    origin = {key: prefix + origin[key] if key in origin else f"parts of {key}" for key in state_dict}
    return Contents(state_dict, origin, container, prefix, model.library, ignored)


def _with_papers_backbone(arrays: StateDict) -> tuple[StateDict, dict[str, str]]:
    """Arrays with MMDetection's PVT, if it is under the heads, in the papers' names; and the old name of each."""
    below = {key: array for key, array in arrays.items() if key.startswith(_BELOW)}
    origin = {key: key for key in arrays}
    if not below or _dialect(below)[0].names != "MMDetection":
        return arrays, origin
    contents = open_contents(below)
    ours = {_BELOW + name: array for name, array in contents.state_dict.items()}
    renamed = {_BELOW + name: key for name, key in contents.origin.items()}
    kept = arrays.keys() - below.keys()
    return {**{key: arrays[key] for key in arrays if key in kept}, **ours}, {**{key: key for key in kept}, **renamed}


def _unwrap(content: Any, weights: str) -> tuple[str, Mapping[str, Any]]:
    """Where the state dict lies in a checkpoint, and the state dict; arguments and errors as of `open_contents`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a training state, the file holds a {type(content).__name__}")
    order = {"auto": EMA + RAW, "ema": EMA + OTHER_EMA, "raw": RAW}[weights]
    inner = {key: content[key] for key in EMA + OTHER_EMA + RAW if _has_arrays(content.get(key))}
    for key in order:
        if key in inner:
            return key, inner[key]
    if _has_arrays(content) and weights != "ema":
        return "the file itself", content
    there = ", ".join(inner) or ("one set of weights without a name" if _has_arrays(content) else None)
    if there:
        raise ValueError(f"--weights={weights}: expected one of {', '.join(order)} in the file; it has {there}")
    keys = ", ".join(brief(str(key)) for key in list(content)[:LISTED])
    raise ValueError(f"expected a state dict, or one under {', '.join(EMA + RAW)}; the file has the keys {keys or '-'}")


def _has_arrays(value: Any) -> bool:
    """Whether a value is a state dict, which may have other things between its arrays."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(array, np.ndarray) for array in value.values())
        and all(isinstance(key, str) for key in value)
    )


def _dialect(keys: Mapping[str, Any]) -> tuple[Dialect, str]:
    """The dialect of keys, and what is before the names that it knows."""
    for dialect in DIALECTS:
        prefixes = {
            key.removesuffix(anchor)
            for anchor in dialect.anchors
            for key in keys
            if key == anchor or key.endswith(f".{anchor}")
        }
        prefixes = {prefix for prefix in prefixes if "ema" not in prefix} or prefixes  # averages beside the weights
        if len(prefixes) > 1:
            there = ", ".join(f"'{brief(prefix)}'" for prefix in sorted(prefixes)[:LISTED])
            raise ValueError(f"expected the weights of one network, there are some under the prefixes {there}")
        for prefix in prefixes:
            for around in dialect.around:
                prefix = re.sub(rf"(^|\.){re.escape(around)}$", r"\1", prefix)
            return dialect, prefix
    return DIALECTS[-1], ""


def _join(state_dict: StateDict, origin: dict[str, str], parts: tuple[str, ...]) -> None:
    for first in [key for key in state_dict if f".attn.{parts[0]}." in key]:
        keys = [first.replace(f".attn.{parts[0]}.", f".attn.{part}.") for part in parts]
        kinds = {(state_dict[key].shape, state_dict[key].dtype) if key in state_dict else None for key in keys}
        if len(kinds) == 1:
            joined = first.replace(f".attn.{parts[0]}.", f".attn.{''.join(parts)}.")
            state_dict[joined] = np.concatenate([state_dict.pop(key) for key in keys])
            origin[joined] = " + ".join(origin.pop(key) for key in keys)


def _split(state_dict: StateDict, origin: dict[str, str]) -> tuple[StateDict, dict[str, str]]:
    """MMDetection has queries, keys and values in one array, and convolutions of 1 x 1 for linear layers."""
    arrays, origins = {}, {}
    for name, array in state_dict.items():
        if ".attn.qkv." in name and array.ndim and array.shape[0] % 3 == 0:
            width = len(array) // 3
            made = {name.replace(".qkv.", ".q."): array[:width], name.replace(".qkv.", ".kv."): array[width:]}
        else:
            made = {name: array[:, :, 0, 0] if ".mlp." in name and array.shape[2:] == (1, 1) else array}
        arrays |= made
        origins |= dict.fromkeys(made, origin[name])
    return arrays, origins
