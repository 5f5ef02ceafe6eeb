"""A small network on scikit-learn's handwritten digits: the whole program on real images, on a CPU, in minutes.

1437 training images, 360 test images (stratified split, see `vitpyramid/data/digits.py`), nothing to download.

    python main.py --config=configs/quickstart.py
    python main.py --config=configs/quickstart.py:rest

After the colon a family: pvt (the default), pit, t2t_vit or rest, each with its own recipe scaled down. Or a task, on
scenes composed of the digits: detect (RetinaNet), detr, deformable_detr, mask (Mask R-CNN) or segment (Semantic FPN),
each on a small PVT, Deformable DETR on a small PiT.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base

FAMILIES = ("pvt", "pit", "t2t_vit", "rest")
DENSE = {
    "detect": "retinanet_pvt_micro",
    "detr": "detr_pvt_micro",
    "deformable_detr": "deformable_detr_pit_micro",
    "mask": "mask_rcnn_pvt_micro",
    "segment": "semantic_fpn_pvt_micro",
}


def get_config(family: str = "pvt") -> ConfigDict:
    if family in DENSE:
        return _scenes(family)
    if family not in FAMILIES:
        raise ValueError(f"configs/quickstart.py:{family}: expected one of {', '.join((*FAMILIES, *DENSE))}")
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 60.0 if family in ("pit", "t2t_vit") else 40.0

    config.model.name = f"{family}_micro"
    config.model.num_classes = 10
    config.model.dtype = "float32"

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = 0.0  # a mirrored digit is another sign
    config.data.eval_crop = 1.0
    config.data.threads = 2

    config.optim.lr = 1e-3
    config.optim.lr_batch = 0
    config.optim.clip_norm = 1.0

    config.schedule.warmup_epochs = 2.0

    if family == "pit":
        config.optim.name = "adamp"
    if family == "rest":
        config.optim.clip_norm = 5.0
    if family == "t2t_vit":
        config.optim.weight_decay = 0.03
        config.schedule.cooldown_epochs = 2.0

    config.eval.batch_size = 120
    config.eval.every_epochs = 10.0
    config.checkpoint.every_epochs = 10.0
    return config


def _scenes(entry: str) -> ConfigDict:
    config = base.get_config()
    config.task = "segment" if entry == "segment" else "detect"
    config.batch_size = 8
    # What a digit is comes late in segmentation: for some 1500 steps it learns no more than where digits are.
    config.epochs = 10.0 if entry == "segment" else 4.0

    config.model.name, config.model.num_classes = DENSE[entry], 11 if entry == "segment" else 10
    config.model.dtype, config.model.drop_path_rate = "float32", 0.0

    data = config.data
    data.name, data.eval_split = "scenes", "test"
    data.image_size = 64  # of the position tables
    data.interpolation, data.flip, data.threads = "bilinear", 0.0, 2
    data.short_side, data.long_side, data.eval_short_side = (64,), 64, 64
    data.canvas = data.eval_canvas = ((64, 64),)
    data.max_boxes, data.masks = 3, entry == "mask"

    config.optim.lr, config.optim.lr_batch = 5e-4 if entry == "segment" else 1e-3, 0
    config.optim.clip_norm = 10.0
    config.schedule.warmup_epochs = 0.2

    config.eval.batch_size = 40
    config.eval.every_epochs = config.checkpoint.every_epochs = 2.0
    if entry == "detr":
        _detr(config)
    if entry == "deformable_detr":
        _deformable_detr(config)
    return config


def _detr(config: ConfigDict) -> None:
    """DETR learns slowly: more epochs of larger batches."""
    config.batch_size, config.epochs = 16, 30.0
    config.optim.lr, config.optim.weight_decay, config.optim.clip_norm = 6e-4, 1e-4, 0.1
    config.schedule.warmup_epochs = 1.0
    config.eval.every_epochs = config.checkpoint.every_epochs = 5.0


def _deformable_detr(config: ConfigDict) -> None:
    config.optim.lr, config.schedule.warmup_epochs = 6e-4, 0.1
    config.eval.every_epochs = config.checkpoint.every_epochs = 1.0
