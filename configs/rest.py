"""ResT v1 on ImageNet, as published (arXiv 2105.13677; github.com/wofmanaf/ResT at its last v1 state).

    python main.py --config=configs/rest.py:base --workdir=runs/rest_base

Variants and published top-1: lite 77.2, small 79.6, base 81.6, large 83.6. 187,500 steps of 2048 images (large: 200,100
of 1920); the authors used 8 GPUs, so their batch norm saw 256 images (large: 240) at a time; here it sees the whole
batch. Warm-up and final rate grow with the batch too. Options, all with
`--config.init=WEIGHTS`: `,finetune=384` (the authors' recipe), `,transfer=224` and `,probe=224` for other data.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = {"lite": 0.1, "small": 0.1, "base": 0.2, "large": 0.3}  # drop path


def get_config(text: str = "small") -> ConfigDict:
    variant, chosen = recipes.parse(text, "configs/rest.py", list(VARIANTS), recipes.ADAPTATIONS)
    config = base.get_config()
    recipes.network(config, f"rest_{variant}")
    recipes.deit(config)
    config.batch_size = 1920 if variant == "large" else 2048
    config.model.drop_path_rate = VARIANTS[variant]
    config.optim.clip_norm = 5.0
    config.schedule.scale_ends = True
    recipes.adapt(config, chosen)
    if "finetune" in chosen:  # 8 GPUs with 128 images, no warm-up
        config.batch_size, config.mix.groups = 1024, 8
        config.schedule.name, config.schedule.warmup_epochs = "constant", 0.0
    return config
