"""From what a checkpoint file holds to a state dict in the papers' names.

Files hold state dicts inside training states, inside detectors, and in the names of other libraries:

    pvt_tiny.pth, pit_*.pth, rest_*.pth, timm   a state dict
    T2T-ViT *.pth.tar (timm's trainer)          state_dict_ema, state_dict, optimizer, args ...
    DeiT, PVT training output                   model, optimizer, args ...
    T2T-ViT transfer learning                   net, acc, epoch; keys begin with `module.`
    PVT, ResT detectors                         state_dict or model; keys begin with `backbone.`
    timm's PiT                                  pooling inside the stages, before (>= 0.9) or behind (<= 0.8) the blocks
    HuggingFace PVT                             `pvt.encoder...`, keys and values apart
    MMDetection PVT                             `layers...`, queries, keys and values together
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

StateDict = dict[str, np.ndarray]

# Where state dicts lie in a training state, the preferred one first.
RAW = ("state_dict", "model", "net")
EMA = ("state_dict_ema",)
OTHER_EMA = ("model_ema", "ema")  # averages that their authors did not report: taken only when asked for
WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
DETECTORS = ("backbone.bottom_up.", "backbone.")
IGNORED = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")  # counters, no parameters

HF_STAGE = (
    (r"^position_embeddings$", r"pos_embed{s}"),
    (r"^cls_token$", r"cls_token"),
    (r"^projection\.", r"patch_embed{s}.proj."),
    (r"^layer_norm\.", r"patch_embed{s}.norm."),
)
HF_BLOCK = (
    ("layer_norm_1.", "norm1."),
    ("layer_norm_2.", "norm2."),
    ("attention.self.query.", "attn.q."),
    ("attention.self.key.", "attn.k."),
    ("attention.self.value.", "attn.v."),
    ("attention.self.sequence_reduction.", "attn.sr."),
    ("attention.self.layer_norm.", "attn.norm."),
    ("attention.output.dense.", "attn.proj."),
    ("mlp.dense1.", "mlp.fc1."),
    ("mlp.dense2.", "mlp.fc2."),
)
MMDET_BLOCK = (
    ("attn.attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.attn.out_proj.", "attn.proj."),
    ("ffn.layers.0.", "mlp.fc1."),
    ("ffn.layers.3.", "mlp.fc2."),
)


class Contents(NamedTuple):
    """A state dict and how it was found.

    Attributes:
      state_dict: arrays by the papers' names.
      origin: the file's key by the papers' name (two joined by " + " where two arrays became one).
      container: where the state dict lay, e.g. "state_dict_ema", "the file itself".
      names: "official", "detector", "timm >= 0.9", "timm <= 0.8", "HuggingFace" or "MMDetection".
      ignored: keys of the file that are no parameters of a backbone.
    """

    state_dict: StateDict
    origin: dict[str, str]
    container: str
    names: str
    ignored: list[str]


def open_contents(content: Any, weights: str = "auto") -> Contents:
    """Finds the state dict in what a checkpoint file holds and gives it the papers' names.

    Args:
      content: what `read_torch_file` returns.
      weights: "ema" or "raw" of a training state; "auto" takes `state_dict_ema` where there is one, which is what
        T2T-ViT's authors release, else the raw weights.

    Raises:
      ValueError: no state dict in it, or not the one asked for; the message lists what there is.
    """
    container, found = _unwrap(content, weights)
    origin = {_strip(key): key for key in found}
    if len(origin) < len(found):
        raise ValueError(f"{container}: keys that differ only by the prefix {' or '.join(WRAPPERS)}")
    ignored = [origin.pop(key) for key in list(origin) if IGNORED.search(key)]
    names = "official"
    for prefix in DETECTORS:
        if any(key.startswith(prefix) for key in origin):
            ignored += [file_key for key, file_key in origin.items() if not key.startswith(prefix)]
            origin = {key.removeprefix(prefix): value for key, value in origin.items() if key.startswith(prefix)}
            names = "detector"
            break
    state_dict = {key: np.asarray(found[file_key]) for key, file_key in origin.items()}
    if any(key.startswith("pvt.encoder.") for key in origin):
        state_dict, origin = _from_hugging_face(state_dict, origin)
        names = "HuggingFace"
    elif "layers.0.0.projection.weight" in origin:
        state_dict, origin = _from_mmdetection(state_dict, origin)
        names = "MMDetection"
    elif any(re.match(r"transformers\.\d+\.pool\.", key) for key in origin):
        shift = 0 if any(key.startswith("transformers.0.pool.") for key in origin) else 1
        renamed = {key: _timm_pool(key, shift) for key in origin}
        state_dict = {renamed[key]: array for key, array in state_dict.items()}
        origin = {renamed[key]: file_key for key, file_key in origin.items()}
        names = "timm >= 0.9" if shift else "timm <= 0.8"
    return Contents(state_dict, origin, container, names, ignored)


def _unwrap(content: Any, weights: str) -> tuple[str, Mapping[str, np.ndarray]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a training state, the file holds a {type(content).__name__}")
    order = {"auto": EMA + RAW, "ema": EMA + OTHER_EMA, "raw": RAW}[weights]
    inner = {key: content[key] for key in EMA + OTHER_EMA + RAW if _is_state_dict(content.get(key))}
    for key in order:
        if key in inner:
            return key, inner[key]
    if _is_state_dict(content) and weights != "ema":
        return "the file itself", content
    there = ", ".join(inner) or ("one set of weights without a name" if _is_state_dict(content) else None)
    if there:
        raise ValueError(f"--weights={weights}: expected one of {', '.join(order)} in the file; it has {there}")
    keys = ", ".join(map(str, list(content)[:10]))
    raise ValueError(f"expected a state dict, or one under {', '.join(EMA + RAW)}; the file has the keys {keys or '-'}")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(array, np.ndarray) for key, array in value.items())
    )


def _strip(key: str) -> str:
    while prefix := next((prefix for prefix in WRAPPERS if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _timm_pool(key: str, shift: int) -> str:
    match = re.match(r"transformers\.(\d+)\.pool\.(.*)", key)
    return f"pools.{int(match[1]) - shift}.{match[2]}" if match else key


def _from_hugging_face(state_dict: StateDict, origin: dict[str, str]) -> tuple[StateDict, dict[str, str]]:
    renamed = {key: _hugging_face_name(key) for key in state_dict}
    arrays = {renamed[key]: array for key, array in state_dict.items()}
    origin = {renamed[key]: file_key for key, file_key in origin.items()}
    for key in [key for key in arrays if ".attn.k." in key]:
        value, joined = key.replace(".attn.k.", ".attn.v."), key.replace(".attn.k.", ".attn.kv.")
        if value in arrays and arrays[key].shape == arrays[value].shape:
            arrays[joined] = np.concatenate([arrays.pop(key), arrays.pop(value)])
            origin[joined] = f"{origin.pop(key)} + {origin.pop(value)}"
    return arrays, origin


def _hugging_face_name(key: str) -> str:
    if match := re.match(r"pvt\.encoder\.patch_embeddings\.(\d)\.(.*)", key):
        for pattern, name in HF_STAGE:
            if re.match(pattern, match[2]):
                return re.sub(pattern, name.format(s=int(match[1]) + 1), match[2])
    if match := re.match(r"pvt\.encoder\.block\.(\d)\.(\d+)\.(.*)", key):
        for prefix, name in HF_BLOCK:
            if match[3].startswith(prefix):
                return f"block{int(match[1]) + 1}.{match[2]}.{name}{match[3].removeprefix(prefix)}"
    return re.sub(r"^pvt\.encoder\.layer_norm\.", "norm.", re.sub(r"^classifier\.", "head.", key))


def _from_mmdetection(state_dict: StateDict, origin: dict[str, str]) -> tuple[StateDict, dict[str, str]]:
    arrays, origins = {}, {}
    for key, array in state_dict.items():
        name = _mmdetection_name(key)
        if ".attn.qkv." in name and array.shape[0] % 3 == 0:
            # Rows of queries, keys, values.
            width = len(array) // 3
            parts = {name.replace(".qkv.", ".q."): array[:width], name.replace(".qkv.", ".kv."): array[width:]}
        elif ".mlp." in name and array.ndim == 4:  # a convolution of 1 x 1
            parts = {name: array[:, :, 0, 0]}
        else:
            parts = {name: array}
        arrays |= parts
        origins |= dict.fromkeys(parts, origin[key])
    return arrays, origins


def _mmdetection_name(key: str) -> str:
    match = re.match(r"layers\.(\d)\.(?:0\.(projection|norm)|1\.0\.(pos_embed)$|1\.(\d+))\.?(.*)", key)
    if not match:
        return key
    stage, patch, table, block, rest = int(match[1]) + 1, *match.groups()[1:]
    if patch:
        return f"patch_embed{stage}.{patch.replace('projection', 'proj')}.{rest}"
    if table:
        return f"pos_embed{stage}"
    for prefix, name in MMDET_BLOCK:
        if rest.startswith(prefix):
            rest = name + rest.removeprefix(prefix)
    return f"block{stage}.{int(block) - 1}.{rest}"
