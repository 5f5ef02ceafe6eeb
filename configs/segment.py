"""Semantic FPN on ADE20K, as in PVT's paper (arXiv 2102.12122, Table 5; github.com/whai362/PVT `segmentation/`).

    python main.py --config=configs/segment.py:semantic_fpn_pvt_small --config.init=pvt_small.pth
        --config.data.data_dir=ADEChallengeData2016 --workdir=runs/semantic_fpn_pvt_small

The folder is the challenge's: `images/training/*.jpg`, `annotations/training/*.png`, and validation.

Published mIoU, of the paper (80,000 steps of 16) and of the released code, whose settings these are (40,000 of 32):

    tiny 35.7, 36.6   small 39.8, 41.9   medium 41.6, 43.5   large 42.1, 43.5

The authors evaluate every image at its own size; here canvases of a few sizes hold them, and the network sees the
borders that are filled up. `--config.data.eval_canvas=()` compiles a step for every size that there is, without them.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = tuple(f"semantic_fpn_pvt_{size}" for size in ("tiny", "small", "medium", "large"))
EPOCH = 632  # steps of 32 of the 20,210 images
WIDTHS = (512, 704, 800, 1024, 2048)


def get_config(text: str = "semantic_fpn_pvt_small") -> ConfigDict:
    variant, _ = recipes.parse(text, "configs/segment.py", VARIANTS, {})
    config = base.get_config()
    config.task = "segment"
    config.batch_size = 32
    config.epochs = 40_000 / EPOCH
    config.eval.batch_size = 32
    config.eval.every_epochs = config.checkpoint.every_epochs = 4000 / EPOCH
    config.model.name, config.model.num_classes = variant, 150
    config.model.drop_path_rate = 0.1

    data = config.data
    data.name, data.eval_split = "ade20k", "validation"
    data.train_split = "training"
    data.resize, data.interpolation = "mmdet", "opencv"
    data.short_side, data.long_side, data.scale_range = (512,), 2048, (0.5, 2.0)
    data.crop, data.canvas, data.cat_max_ratio, data.photometric = True, ((512, 512),), 0.75, True
    data.eval_short_side, data.eval_align = 512, 32
    data.eval_canvas = tuple({size: None for width in WIDTHS for size in ((512, width), (width, 512))})

    config.optim.lr, config.optim.lr_batch = 2e-4, 32
    config.optim.weight_decay, config.optim.decay_vectors = 1e-4, True
    schedule = config.schedule
    schedule.name, schedule.power, schedule.min_lr, schedule.round_up = "poly", 0.9, 0.0, True
    schedule.warmup_epochs = 0.0
    return config
