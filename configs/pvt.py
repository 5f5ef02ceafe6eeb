"""PVT v1 on ImageNet, as published (arXiv 2102.12122, Table 2; github.com/whai362/PVT).

    python main.py --config=configs/pvt.py:small --workdir=runs/pvt_small

Variants and published top-1: tiny 75.1, small 79.8, medium 81.2, large 81.7. 375,300 steps of 1024 images; the authors
used 8 GPUs. Options, all with `--config.init=WEIGHTS`: `,finetune=384` (DeiT's recipe; none was published for PVT),
`,transfer=224` and `,probe=224` for other data.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = ("tiny", "small", "medium", "large")


def get_config(text: str = "small") -> ConfigDict:
    variant, chosen = recipes.parse(text, "configs/pvt.py", VARIANTS, recipes.ADAPTATIONS)
    config = base.get_config()
    recipes.network(config, f"pvt_{variant}")
    recipes.deit(config)
    if variant in ("medium", "large"):  # they diverge with the settings of the smaller ones
        config.model.drop_path_rate = 0.3
        config.optim.clip_norm = 1.0
    return recipes.adapt(config, chosen)
