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
            "levels": (1,),
            "channels": 128,
            "ffn_channels": 256,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "queries": 10,
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


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a network for dense prediction.

    Attributes:
      parameters: trainable ones.
      published: the same in the papers, in millions.
      gmacs: published multiply-accumulates, in units of 1e9: of detectors at 800 x 1280, of segmenters at 512 x 512.
    """

    parameters: int
    published: float | None = None
    gmacs: float | None = None


# PVT: Tables 3, 4, 5, 10 and 11 of the paper; ResT: the tables of its repository.
FACTS: dict[str, Facts] = {
    "retinanet_pvt_tiny": Facts(22_964_724, 23.0),
    "retinanet_pvt_small": Facts(34_221_300, 34.2, 285.8),
    "retinanet_pvt_medium": Facts(53_943_540, 53.9),
    "retinanet_pvt_large": Facts(71_104_756, 71.1),
    "retinanet_rest_small": Facts(23_401_064, 23.4),
    "retinanet_rest_base": Facts(40_497_304, 40.5),
    "retinanet_rest_large": Facts(61_846_408, 61.8),
    "mask_rcnn_pvt_tiny": Facts(32_882_160, 32.9),
    "mask_rcnn_pvt_small": Facts(44_138_736, 44.1, 304.4),
    "mask_rcnn_pvt_medium": Facts(63_860_976, 63.9),
    "mask_rcnn_pvt_large": Facts(81_022_192, 81.0),
    "mask_rcnn_rest_small": Facts(33_318_628, 33.3),
    "mask_rcnn_rest_base": Facts(49_833_300, 49.8),
    "mask_rcnn_rest_large": Facts(71_182_404),
    "semantic_fpn_pvt_tiny": Facts(16_981_398, 17.0, 33.2),
    "semantic_fpn_pvt_small": Facts(28_237_974, 28.2, 44.5),
    "semantic_fpn_pvt_medium": Facts(47_960_214, 48.0, 61.0),
    "semantic_fpn_pvt_large": Facts(65_121_430, 65.1, 79.6),
    "detr_pvt_small": Facts(41_645_141),
    "deformable_detr_pit_s": Facts(35_444_742),
    "deformable_detr_refine_pit_s": Facts(36_210_602),
    # 36.6 published, with 91 classes.
    "deformable_detr_two_stage_pit_s": Facts(36_539_644),
    "retinanet_pvt_micro": Facts(1_807_390),
    "mask_rcnn_pvt_micro": Facts(1_590_476),
    "semantic_fpn_pvt_micro": Facts(1_701_227),
    "detr_pvt_micro": Facts(1_024_175),
    "deformable_detr_pit_micro": Facts(1_490_284),
}


def list_models(pattern: str = "") -> list[str]:
    """As `models.registry.list_models`, networks for dense prediction included, behind the others."""
    return registry.names_like(pattern, _known())


def model_facts(name: str) -> dict:
    """As `models.registry.model_facts`; of a network for dense prediction those of its backbone, whose name is added as
    `backbone`, with its own `parameters` and `gmacs` (see `Facts`; None where nothing is known), and no `top1`."""
    if name not in DENSE:
        return registry.model_facts(name)
    variant, facts = DENSE[name], FACTS.get(name)
    return {
        **registry.model_facts(variant.backbone),
        "name": name,
        "family": variant.network.__name__,
        "backbone": variant.backbone,
        "num_classes": variant.options.get("num_classes", variant.network.num_classes),
        "parameters": facts and facts.parameters,
        "gmacs": facts and facts.gmacs,
        "top1": None,
    }


def _known() -> list[str]:
    return [*registry.VARIANTS, *DENSE]


def create_model(name: str, backbone: str | Backbone | None = None, **overrides) -> Backbone | DenseNetwork:
    """The network called `name`, as a Flax module without weights.

    Args:
      name: one of `list_models()`.
      backbone: of a network for dense prediction, what its heads stand on: a name, or a module; None or "": its own.
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
        if backbone:
            raise TypeError(f"{name} has no option 'backbone'")
        return registry.create_model(name, **overrides)
    variant = DENSE[name]
    options = variant.options | overrides
    of_heads = {f.name for f in dataclasses.fields(variant.network)} - {"name", "parent", "backbone"}
    heads = {key: value for key, value in options.items() if key in of_heads}
    below = {key: value for key, value in options.items() if key not in of_heads or key in ("dtype", "remat")}
    if backbone:
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
