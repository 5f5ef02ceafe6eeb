"""DETR and Deformable DETR on COCO, as in the papers of PVT (arXiv 2102.12122) and PiT (arXiv 2103.16302).

    python main.py --config=configs/detr.py:detr_pvt_small --config.init=pvt_small.pth
        --config.data.data_dir=COCO --workdir=runs/detr_pvt_small

COCO is a folder as its authors publish it: `annotations/instances_train2017.json`, `train2017/*.jpg`, and val2017.
`--config.init` takes a classifier's weights, also its authors' file; what does not fit is named.
`--config.model.backbone=rest_small` puts another backbone under it.

    detr_pvt_small                    AP 34.7 of boxes after 50 epochs (of ResNet-50 in the same setting: 32.3)
    deformable_detr_two_stage_pit_s   39.4, at half the usual resolution (ResNet-50: 41.5)

DETR: mmdetection's settings, of whai362/PVT `detection/configs/detr_pvt_s_8x2_50ep_coco.py`: 8 GPUs with two images
each. The authors' cross entropy is a mean over the queries of a GPU's two images, ours over those of the whole batch.

Deformable DETR: its authors' settings, of fundamentalvision/Deformable-DETR `main.py`, with images half as large, as
in PiT's paper; also `deformable_detr_pit_s` and `deformable_detr_refine_pit_s`, with learned queries, without and with
refinement of boxes. Of the three, the one in two stages has the published number of parameters: 36.6 million, with 91
classes. PiT's authors published no code of it; their batch and their drop path are not known. Half of the images are
cropped before they are resized, `data.crop_short_side`, as in the original code of both detectors, which PVT's settings
leave out. Crops lie on the canvas of their image: those that are upright while the image is wide, or wide while it is
upright, are resized to those of the sizes alone that fit on it (the original pads a batch to its largest image).
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

DEFORMABLE = tuple(f"deformable_detr_{kind}pit_s" for kind in ("", "refine_", "two_stage_"))
VARIANTS = ("detr_pvt_small", *DEFORMABLE)


def get_config(text: str = "detr_pvt_small") -> ConfigDict:
    variant, _ = recipes.parse(text, "configs/detr.py", VARIANTS, {})
    config = base.get_config()
    config.task = "detect"
    config.batch_size = config.eval.batch_size = 16
    config.epochs = 50.0
    config.model.name, config.model.num_classes = variant, 80
    config.model.drop_path_rate = 0.1
    config.data.name, config.data.train_split, config.data.eval_split = "coco", "train2017", "val2017"

    optim, schedule = config.optim, config.schedule
    optim.lr, optim.lr_batch = 1e-4, 16
    optim.lr_rules = (("^backbone/", 0.1), (".*", 1.0))
    optim.weight_decay, optim.decay_vectors, optim.clip_norm = 1e-4, True, 0.1
    schedule.name, schedule.round_up = "step", True
    schedule.drops, schedule.warmup_epochs = (33.0,), 0.0
    (_deformable if variant in DEFORMABLE else _mmdetection)(config)
    return config


def _mmdetection(config: ConfigDict) -> None:
    data = config.data
    data.resize, data.interpolation = "mmdet", "opencv"
    data.short_side = tuple(range(640, 801, 32))


def _deformable(config: ConfigDict) -> None:
    data = config.data
    data.resize, data.interpolation = "detr", "bilinear"
    data.short_side, data.long_side, data.eval_short_side = tuple(range(240, 401, 16)), 666, 400
    data.crop_short_side, data.crop_side = (200, 250, 300), (192, 300)
    data.canvas = data.eval_canvas = ((400, 672), (672, 400))
    config.optim.lr = 2e-4
    config.optim.lr_rules = (("^backbone/", 0.1), ("reference_points|sampling_offsets", 0.1), (".*", 1.0))
    config.schedule.drops = (40.0,)
