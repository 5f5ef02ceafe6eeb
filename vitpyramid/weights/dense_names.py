"""Variables of any network in PyTorch's names, and back.

Those of networks for dense prediction are mmdetection's, mmsegmentation's or detectron2's: the rule of `names` and,
over it, whole prefixes. mmdetection's are ours, with `.conv` behind what is a list of convolutions. Three arrays have
another form in PyTorch:

    shared_fcs_0/kernel  [h, w, in, out]   a matrix [out, in * h * w]: maps are flattened channel-first there
    upsample/kernel      [h, w, in, out]   a transposed convolution's [in, out, h, w]
    loss_normaliser                        detectron2 keeps it in no file: 100 on the way in
"""

import functools
import re
from collections.abc import Collection, Mapping

import numpy as np
from flax import traverse_util

from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.registry import DENSE, create_model
from vitpyramid.models.backbone import Backbone
from vitpyramid.weights import detr_names, names
from vitpyramid.weights.names import Path

NORMALISER = ("batch_stats", "loss_normaliser")
FIRST_NORMALISER = np.array(100.0, np.float32)
# Buffers of detectron2 that are no parameters.
IGNORED = re.compile(rf"(\.{names.COUNTER}|^pixel_(mean|std)|anchor_generator\.cell_anchors\.\d+)$")


def torch_to_flax(name: str, state_dict: Mapping, backbone: str = "") -> dict:
    """`names.torch_to_flax` of any of `list_models()`, with the `backbone` that heads stand on; "": their own."""
    if name not in DENSE:
        return names.torch_to_flax(name, state_dict)
    network = network_of(name, {key: np.shape(value) for key, value in state_dict.items()}, backbone)
    return from_state_dict(create_model(**network), state_dict)


def flax_to_torch(
    name: str, variables: Mapping, library: str | None = None, backbone: str = ""
) -> dict[str, np.ndarray]:
    """`names.flax_to_torch` of any of `list_models()`; inverse of `torch_to_flax`.

    Args:
      library: of a network whose weights can have the names of several: which of its `libraries`; None: its own.
      backbone: that heads stand on; "": their own.
    """
    if name not in DENSE:
        return names.flax_to_torch(name, variables)
    return to_state_dict(create_model(name, backbone, **({"library": library} if library else {})), variables)


def network_of(name: str, torch_shapes: names.Shapes, backbone: str = "") -> dict:
    """`names.network_of` of any of `list_models()`; with heads on a backbone also "backbone", and "library" where the
    names are not its own one's."""
    if name not in DENSE:
        return names.network_of(name, torch_shapes)
    own = create_model(name, backbone)
    model = named_as(own, torch_shapes)
    tables = {}
    for ours, table in zip(model.backbone.position_tables, model.position_tables, strict=True):
        key = torch_name(model, tuple(table.path.split("/")))
        tables |= {ours.path: names.flax_shape(table.path, torch_shapes[key])} if key in torch_shapes else {}
    return {
        "name": name,
        "backbone": backbone,
        "num_classes": classes_in(model, torch_shapes) or model.num_classes,
        "image_size": model.backbone.native_side(tables) or model.backbone.image_size,
        **({} if model.library == own.library else {"library": model.library}),
    }


def named_as(own: DenseNetwork, keys: Collection[str]) -> DenseNetwork:
    """The network with the library whose names the keys are."""
    models = [own.clone(library=library) for library in own.libraries]
    # What stands first behind the backbone is called otherwise by each of them.
    return next((model for model in models if torch_name(model, ("params", model.after[0], "bias")) in keys), own)


def in_one_form(model: DenseNetwork, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the keys that `torch_shapes` has, of a state dict that may have them in parts, or more than once.

    Raises:
      ValueError: what should be the same array differs.
    """
    arrays = detr_names.join(arrays) if _is_split(model) else dict(arrays)
    for path in _shapes(model):
        first, *others = _all_names(model, path)
        for key in others:
            if key in arrays:
                array = arrays.pop(key)
                if not np.array_equal(arrays.setdefault(first, array), array, equal_nan=True):
                    raise ValueError(f"{key} differs from {first}: expected the same array")
    return arrays


def classes_in(model: Backbone | DenseNetwork, torch_shapes: names.Shapes) -> int | None:
    """Number of classes of a state dict; None without a head."""
    if isinstance(model, Backbone):
        return names.head_rows(torch_shapes)
    keys = _all_names(model, ("params", *model.class_layer.split("/"), "bias"))
    rows = next((torch_shapes[key] for key in keys if key in torch_shapes), None)
    return model.classes_of(rows[0]) if rows else None


def from_state_dict(model: DenseNetwork, state_dict: Mapping) -> dict:
    """Variables of `model` from a PyTorch state dict, or from anything else that has an array for every parameter.

    Args:
      model: whose `library` says whose names these are. It has the number of classes, the width of the heads and the
        image size (of position tables) of the state dict.
      state_dict: arrays by PyTorch name, in PyTorch layout.

    Returns:
      `{"params": nested dict of numpy arrays, ...}`: copies, each in the dtype it came in.

    Raises:
      ValueError: missing keys, unexpected keys, wrong shapes (the message lists them).
    """
    arrays = {key: np.asarray(value) for key, value in state_dict.items() if not IGNORED.search(key)}
    arrays = in_one_form(model, arrays)
    shapes, expected = _shapes(model), torch_shapes(model)
    found = {key: array.shape for key, array in arrays.items()}
    if problems := names.compare(found, expected):
        listed = names.describe(problems, found, expected)
        raise ValueError(f"these are not the parameters of this {type(model).__name__}\n{listed}")
    flat = {path: from_torch(path, arrays[torch_name(model, path)], shape) for path, shape in shapes.items()}
    if _has_normaliser(model):
        flat[NORMALISER] = FIRST_NORMALISER
    return traverse_util.unflatten_dict(flat)


def to_state_dict(model: DenseNetwork, variables: Mapping) -> dict[str, np.ndarray]:
    """PyTorch state dict of `model`; inverse of `from_state_dict`, bit for bit, but for the normaliser of losses."""
    flat = traverse_util.flatten_dict(variables)
    flat.pop(NORMALISER, None)
    state_dict = {
        key: array
        for path, value in flat.items()
        for array in [_to_torch(path, np.asarray(value))]
        for key in _all_names(model, path)
    }
    if _is_split(model):
        state_dict = detr_names.split(state_dict)
    means = [key for key in state_dict if key.endswith(".running_mean")]
    return state_dict | {key.replace("running_mean", names.COUNTER): np.zeros((), np.int64) for key in means}


def torch_shapes(model: DenseNetwork) -> names.Shapes:
    """Shapes of all that is in files, by PyTorch's name, in PyTorch's layout."""
    return {torch_name(model, path): torch_shape(path, shape) for path, shape in _shapes(model).items()}


def torch_name(model: Backbone | DenseNetwork, path: Path) -> str:
    """PyTorch's name of the variable at a path, collection first."""
    name = names.torch_name(path)
    if isinstance(model, Backbone):
        return name
    if model.libraries:
        return detr_names.renamed(name, model)
    if model.library != "detectron2":
        return re.sub(r"((?:\w+_)?convs\.\d+)\.", r"\1.conv.", name)
    prefixes = _detectron2(tuple(model.backbone.strides[i] for i in model.levels))
    first = next(prefix for prefix in prefixes if name.startswith(prefix + "."))
    return prefixes[first] + name.removeprefix(first)


def _all_names(model: DenseNetwork, path: Path) -> list[str]:
    """PyTorch's name, and those under which files have the same array once more."""
    twins = detr_names.twins(names.torch_name(path), model)
    return [torch_name(model, path), *(detr_names.renamed(twin, model) for twin in twins)]


@functools.lru_cache
def _detectron2(strides: tuple[int, ...]) -> dict[str, str]:
    """detectron2's prefixes by ours, of a network whose FPN reads these strides: a level is called by its octave."""
    first, read = round(np.log2(strides[0])), len(strides)
    roi = "roi_heads.mask_head."
    return {
        **{f"neck.lateral_convs.{i}": f"backbone.fpn_lateral{first + i}" for i in range(read)},
        **{f"neck.fpn_convs.{i}": f"backbone.fpn_output{first + i}" for i in range(read)},
        **{f"neck.fpn_convs.{i}": f"backbone.top_block.p{first + i}" for i in range(read, read + 2)},
        "backbone": "backbone.bottom_up",
        **{f"bbox_head.cls_convs.{i}": f"head.cls_subnet.{2 * i}" for i in range(4)},
        **{f"bbox_head.reg_convs.{i}": f"head.bbox_subnet.{2 * i}" for i in range(4)},
        "bbox_head.retina_cls": "head.cls_score",
        "bbox_head.retina_reg": "head.bbox_pred",
        "rpn_head.rpn_conv": "proposal_generator.rpn_head.conv",
        "rpn_head.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
        "rpn_head.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
        "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc1",
        "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc2",
        "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
        "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
        **{f"roi_head.mask_head.convs.{i}": f"{roi}mask_fcn{i + 1}" for i in range(4)},
        "roi_head.mask_head.upsample": f"{roi}deconv",
        "roi_head.mask_head.conv_logits": f"{roi}predictor",
    }


def _shapes(model: DenseNetwork) -> dict[Path, tuple[int, ...]]:
    """Of all that is in files, by path."""
    return {path: shape for path, shape in names.variable_shapes(model).items() if path != NORMALISER}


def _is_split(model: DenseNetwork) -> bool:
    return bool(model.libraries) and model.library == "huggingface"


def _has_normaliser(model: DenseNetwork) -> bool:
    return getattr(model, "normaliser", "") == "moving"


def _axes(path: Path, ndim: int) -> tuple[int, ...]:
    return (2, 3, 0, 1) if path[-2:] == ("upsample", "kernel") else names.torch_axes(path, ndim)


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the array at a path, in PyTorch's layout."""
    shape = tuple(shape[axis] for axis in _axes(path, len(shape)))
    return (shape[0], int(np.prod(shape[1:]))) if path[-2] == "shared_fcs_0" and len(shape) > 1 else shape


def _to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    turned = array.transpose(_axes(path, array.ndim))
    return np.array(turned.reshape(torch_shape(path, array.shape)), order="C")


def from_torch(path: Path, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A PyTorch array as the one of this shape at a path: a copy."""
    axes = _axes(path, len(shape))
    turned = array.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.array(turned, order="C")
