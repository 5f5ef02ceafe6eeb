"""DETR on COCO, as in the paper of PVT (arXiv 2102.12122, Table 6).

    python main.py --config=configs/detr.py:detr_pvt_small --config.init=pvt_small.pth
        --config.data.data_dir=COCO --workdir=runs/detr_pvt_small

COCO is a folder as its authors publish it: `annotations/instances_train2017.json`, `train2017/*.jpg`, and val2017.
`--config.init` takes a classifier's weights, also its authors' file; what does not fit is named.
`--config.model.backbone=rest_small` puts another backbone under it.

    detr_pvt_small   AP 34.7 of boxes after 50 epochs (of ResNet-50 in the same setting: 32.3)

mmdetection's settings, of whai362/PVT `detection/configs/detr_pvt_s_8x2_50ep_coco.py`: 8 GPUs with two images each.
The authors' cross entropy is a mean over the queries of a GPU's two images, ours over those of the whole batch.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = ("detr_pvt_small",)


def get_config(text: str = "detr_pvt_small") -> ConfigDict:
    variant, _ = recipes.parse(text, "configs/detr.py", VARIANTS, {})
    config = base.get_config()
    config.task = "detect"
    config.batch_size = config.eval.batch_size = 16
    config.epochs = 50.0
    config.model.name, config.model.num_classes = variant, 80
    config.model.drop_path_rate = 0.1

    data = config.data
    data.name, data.train_split, data.eval_split = "coco", "train2017", "val2017"
    data.resize, data.interpolation = "mmdet", "opencv"
    data.short_side = tuple(range(640, 801, 32))

    optim, schedule = config.optim, config.schedule
    optim.lr, optim.lr_batch = 1e-4, 16
    optim.lr_rules = (("^backbone/", 0.1), (".*", 1.0))
    optim.weight_decay, optim.decay_vectors, optim.clip_norm = 1e-4, True, 0.1
    schedule.name, schedule.round_up = "step", True
    schedule.drops, schedule.warmup_epochs = (33.0,), 0.0
    return config
