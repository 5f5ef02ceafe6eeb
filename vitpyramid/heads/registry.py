"""Networks by name: the backbones, and the heads that stand on them."""

import dataclasses
from typing import Any

from vitpyramid.heads import mask_rcnn, retinanet
from vitpyramid.heads.deformable_detr import DeformableDETR
from vitpyramid.heads.detr import DETR
from vitpyramid.heads.mask_rcnn import MaskRCNN
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.retinanet import RetinaNet
from vitpyramid.heads.semantic_fpn import SemanticFPN
from vitpyramid.models import registry
from vitpyramid.models.backbone import Backbone


@dataclasses.dataclass(frozen=True)
class DenseVariant:
    """One named network for dense prediction.

    Attributes:
      network: class of its heads.
      backbone: name of what they stand on.
      options: of both, beyond their defaults.
    """

    network: type[DenseNetwork]
    backbone: str
    options: dict[str, Any]


# Drop path of PVT's detection/pvt.py (segmentation/pvt.py has .1 for all) and of ResT's d2/rest.py.
_PVT_DROP_PATH = {"tiny": 0.1, "small": 0.1, "medium": 0.0, "large": 0.0}
_REST_DROP_PATH = {"small": 0.1, "base": 0.2, "large": 0.2}


def _standing_on(family: str, drop_paths: dict[str, float], prefix: str, network: type, **options):
    return {
        f"{prefix}_{family}_{size}": DenseVariant(network, f"{family}_{size}", {"drop_path_rate": rate, **options})
        for size, rate in drop_paths.items()
    }


DENSE: dict[str, DenseVariant] = {
    **_standing_on("pvt", _PVT_DROP_PATH, "retinanet", RetinaNet),
    **_standing_on("rest", _REST_DROP_PATH, "retinanet", RetinaNet, **retinanet.DETECTRON2),
    **_standing_on("pvt", _PVT_DROP_PATH, "mask_rcnn", MaskRCNN),
    **_standing_on("rest", _REST_DROP_PATH, "mask_rcnn", MaskRCNN, **mask_rcnn.DETECTRON2),
    **_standing_on("pvt", dict.fromkeys(_PVT_DROP_PATH, 0.1), "semantic_fpn", SemanticFPN),
    "detr_pvt_small": DenseVariant(DETR, "pvt_small", {"drop_path_rate": 0.1}),
    "deformable_detr_pit_s": DenseVariant(DeformableDETR, "pit_s", {"drop_path_rate": 0.1}),
    "deformable_detr_refine_pit_s": DenseVariant(DeformableDETR, "pit_s", {"drop_path_rate": 0.1, "refine": True}),
    "deformable_detr_two_stage_pit_s": DenseVariant(
        DeformableDETR, "pit_s", {"drop_path_rate": 0.1, "refine": True, "two_stage": True}
    ),
}


# Not from the papers: for small images and small machines. Anchors begin at 16 pixels.
_MICRO = {"channels": 32, "num_classes": 10}
DENSE |= {
    "retinanet_pvt_micro": DenseVariant(
        RetinaNet,
        "pvt_micro",
        {**_MICRO, "channels": 64, "depth": 2, "scales": tuple(2 * 2 ** (i / 3) for i in range(3))},
    ),
    "mask_rcnn_pvt_micro": DenseVariant(
        MaskRCNN,
        "pvt_micro",
        {
            **_MICRO,
            "fc_channels": 128,
            "rpn_before": (200, 100),
            "rpn_after": (100, 50),
            "roi_samples": 32,
            "most_detections": 20,
        },
    ),
    "semantic_fpn_pvt_micro": DenseVariant(
        SemanticFPN, "pvt_micro", {"channels": 64, "head_channels": 64, "num_classes": 11}
    ),
    "detr_pvt_micro": DenseVariant(
        DETR,
        "pvt_micro",
        {
            "levels": (2,),
            "channels": 128,
            "ffn_channels": 256,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "queries": 20,
            "head_drop_rate": 0.0,
            "num_classes": 10,
        },
    ),
    "deformable_detr_pit_micro": DenseVariant(
        DeformableDETR,
        "pit_micro",
        {
            "channels": 64,
            "heads": 4,
            "ffn_channels": 128,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "feature_levels": 3,
            "queries": 20,
            "refine": True,
            "head_drop_rate": 0.0,
            "most_detections": 20,
            "num_classes": 10,
        },
    ),
}


def list_models(pattern: str = "") -> list[str]:
    """As `models.registry.list_models`, networks for dense prediction included, behind the others."""
    return registry.names_like(pattern, _known())


def model_facts(name: str) -> dict:
    """As `models.registry.model_facts`; of a network for dense prediction those of its backbone, whose name is added as
    `backbone`, with `parameters`, `gmacs` and `top1` None."""
    if name not in DENSE:
        return registry.model_facts(name)
    variant = DENSE[name]
    return {
        **registry.model_facts(variant.backbone),
        "name": name,
        "family": variant.network.__name__,
        "backbone": variant.backbone,
        "num_classes": variant.options.get("num_classes", variant.network.num_classes),
        **dict.fromkeys(("parameters", "gmacs", "top1")),
    }


def _known() -> list[str]:
    return [*registry.VARIANTS, *DENSE]


def create_model(name: str, backbone: str | Backbone | None = None, **overrides) -> Backbone | DenseNetwork:
    """The network called `name`, as a Flax module without weights.

    Args:
      name: one of `list_models()`.
      backbone: of a network for dense prediction, what its heads stand on: a name, or a module; None: its own.
        Under another than its own the variant's `drop_path_rate` and `levels` do not count.
      **overrides: fields of the family's module to change, e.g. `num_classes`, `dtype`, `drop_path_rate`, `image_size`.
        Of a network for dense prediction: fields of the heads' module, and of the backbone's where the heads have no
        such field; `dtype` and `remat` go to both.

    Returns:
      A module. `model.init(rng, images)` makes variables for images `[B, H, W, 3]`, normalised floats; what
      `model.apply(variables, images)` gives, the module's class says: logits `[B, num_classes]` of a `Backbone`,
      `Detections` of detectors, logits `[B, h, w, num_classes]` of segmenters.

    Raises:
      ValueError: unknown `name` or `backbone`; an option with a value that none can have.
      TypeError: an override that neither has; a backbone under a network that is one.
    """
    if name not in _known():
        raise ValueError(f"unknown model {name!r}; {registry.suggestion(str(name), _known())}")
    if name not in DENSE:
        if backbone is not None:
            raise TypeError(f"{name} has no option 'backbone'")
        return registry.create_model(name, **overrides)
    variant = DENSE[name]
    options = variant.options | overrides
    of_heads = {f.name for f in dataclasses.fields(variant.network)} - {"name", "parent", "backbone"}
    heads = {key: value for key, value in options.items() if key in of_heads}
    below = {key: value for key, value in options.items() if key not in of_heads or key in ("dtype", "remat")}
    if backbone is not None:
        for key in {"drop_path_rate", "levels"} - overrides.keys():
            below.pop(key, None), heads.pop(key, None)
    if not isinstance(backbone, Backbone):
        backbone = registry.create_model(backbone or variant.backbone)
    of_backbone = {f.name for f in dataclasses.fields(backbone)} - {"name", "parent", "num_classes"}
    if unknown := below.keys() - of_backbone:
        raise TypeError(f"{name} has no option {min(unknown)!r}; expected one of {', '.join(of_heads | of_backbone)}")
    registry.check_options(options)
    network = backbone.clone(**below)
    heads = {"levels": variant.network.levels_of(network.strides), **heads}
    return variant.network(backbone=network.dense(heads["levels"]), **heads)
