"""DeiT on ImageNet, as published (arXiv 2012.12877; github.com/facebookresearch/deit): the plain transformer beside.

    python main.py --config=configs/deit.py:small --workdir=runs/deit_small

Variants and published top-1: tiny 72.2, small 79.9, base 81.8; with `,setting=distill` and
`--config.distill.teacher=WEIGHTS` 74.5, 81.2, 83.4. 375,300 steps of 1024 images. The authors report the raw weights;
the average that their code keeps beside them is kept here as well. Options, all with `--config.init=WEIGHTS`:
`,finetune=384` (base: 82.9), `,transfer=224` and `,probe=224` for other data.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = ("tiny", "small", "base")


def get_config(text: str = "small") -> ConfigDict:
    options = {"setting": ("plain", "distill"), **recipes.ADAPTATIONS}
    variant, chosen = recipes.parse(text, "configs/deit.py", VARIANTS, options)
    config = base.get_config()
    recipes.network(config, f"deit_{variant}")
    recipes.deit(config)
    config.ema.decay = 0.99996
    if chosen.get("setting") == "distill":
        recipes.distill(config)
    return recipes.adapt(config, chosen)
