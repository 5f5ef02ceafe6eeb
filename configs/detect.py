"""RetinaNet and Mask R-CNN on COCO, as in the papers of PVT (arXiv 2102.12122) and ResT (arXiv 2105.13677).

    python main.py --config=configs/detect.py:retinanet_pvt_small --config.init=pvt_small.pth
        --config.data.data_dir=COCO --workdir=runs/retinanet_pvt_small

COCO is a folder as its authors publish it: `annotations/instances_train2017.json`, `train2017/*.jpg`, and val2017.
`--config.init` takes a classifier's weights, also its authors' file; what does not fit is named.

Published AP of boxes, and of masks, at 12 epochs (`1x`, the default) and 36 (`,schedule=3x`, several sizes):

                  RetinaNet 1x   3x      Mask R-CNN 1x   3x
    pvt_tiny      36.7           39.4    36.7  35.1      39.8  37.4
    pvt_small     40.4           42.2    40.4  37.8      43.0  39.9
    pvt_medium    41.9           43.2    42.0  39.0      44.2  40.5
    pvt_large     42.6           43.4    42.9  39.5      44.5  40.7
    rest_small    40.3                   39.6  37.2
    rest_base     42.0                   41.6  38.7

PVT: mmdetection's settings, of whai362/PVT `detection/configs`; `,size=640` is its smaller images (pvt_small: 38.7).
ResT: detectron2's, of wofmanaf/ResT `d2/configs`, whose images are not normalised as its classifier's are: blue, green,
red, and not divided by a deviation. The authors used 8 GPUs with two images each (Mask R-CNN with pvt_large: one).
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

PVT, REST = ("tiny", "small", "medium", "large"), ("small", "base", "large")
DROP_PATH = {"pvt_tiny": 0.1, "pvt_small": 0.1, "rest_small": 0.1, "rest_base": 0.2, "rest_large": 0.2}
VARIANTS = tuple(
    f"{head}_{family}_{size}"
    for head in ("retinanet", "mask_rcnn")
    for family, sizes in (("pvt", PVT), ("rest", REST))
    for size in sizes
)
EPOCH = 7330  # steps of 16 of COCO's images with boxes


def get_config(text: str = "retinanet_pvt_small") -> ConfigDict:
    options = {"schedule": ("1x", "3x"), "size": ("800", "640")} if "_pvt_" in text else {}
    variant, chosen = recipes.parse(text, "configs/detect.py", VARIANTS, options)
    backbone = variant.split("_", 2 if variant.startswith("mask") else 1)[-1]
    config = base.get_config()
    config.task = "detect"
    config.batch_size = 16
    config.eval.batch_size = 16
    config.model.name, config.model.num_classes = variant, 80
    config.model.drop_path_rate = DROP_PATH.get(backbone, 0.0)
    config.loss.images_per_group = 2

    data = config.data
    data.name, data.train_split, data.eval_split = "coco", "train2017", "val2017"
    data.masks = variant.startswith("mask")
    optim, schedule = config.optim, config.schedule
    optim.lr, optim.lr_batch, optim.decay_vectors = 1e-4, 16, True
    schedule.name, schedule.scale_ends, schedule.round_up = "step", True, True
    (_mmdetection if backbone.startswith("pvt") else _detectron2)(config)

    if variant == "mask_rcnn_pvt_large":  # one image on each of 8 GPUs, and a smaller rate
        config.batch_size = optim.lr_batch = 8
        optim.lr, config.loss.images_per_group = 2e-4 / 1.4, 1
        schedule.warmup_lr = optim.lr * 1e-3
    if chosen.get("schedule") == "3x":
        config.epochs = 36.0
        schedule.drops = (27.0, 33.0)
        data.short_side, data.short_side_range = (640, 800), True
    if chosen.get("size") == "640":
        data.short_side, data.long_side, data.eval_short_side = (640,), 1066, 640
        data.canvas = data.eval_canvas = ((640, 1088), (1088, 640))
    return config


def _mmdetection(config: ConfigDict) -> None:
    config.epochs = 12.0
    config.data.resize, config.data.interpolation = "mmdet", "opencv"
    config.optim.lr = 2e-4 if config.data.masks else 1e-4
    config.optim.weight_decay = 1e-4
    schedule = config.schedule
    schedule.drops = (8.0, 11.0)
    schedule.warmup_epochs, schedule.warmup_lr = 500 / EPOCH, config.optim.lr * 1e-3


def _detectron2(config: ConfigDict) -> None:
    config.epochs = 90_000 / EPOCH
    data = config.data
    data.resize, data.interpolation = "detectron2", "bilinear"
    data.short_side = tuple(range(640, 801, 32))
    data.channels = "bgr"
    data.mean, data.std = (103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255,) * 3
    config.optim.weight_decay, config.optim.decay_norms = 0.05, False
    schedule = config.schedule
    schedule.drops = (60_000 / EPOCH, 80_000 / EPOCH)
    schedule.warmup_epochs, schedule.warmup_lr = 1000 / EPOCH, config.optim.lr * 1e-3
