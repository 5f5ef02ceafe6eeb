"""PVT v1 on ImageNet, as published: `--config=configs/pvt.py:VARIANT`, VARIANT one of tiny, small, medium, large.

Published top-1 (github.com/whai362/PVT): tiny 75.1, small 79.8, medium 81.2, large 81.7. 375,300 steps of 1024 images.
Mixup, CutMix, RandAugment, random erasing and repeated augmentation, with which those were reached, are not here yet.

    python main.py --config=configs/pvt.py:small --workdir=runs/pvt_small
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "small") -> ConfigDict:
    if variant not in ("tiny", "small", "medium", "large"):
        raise ValueError(f"configs/pvt.py:{variant}: expected tiny, small, medium or large")
    config = base.get_config()
    config.model.name = f"pvt_{variant}"
    if variant in ("medium", "large"):  # they diverge with the settings of the smaller ones
        config.model.drop_path_rate = 0.3
        config.optim.clip_norm = 1.0
    return config
