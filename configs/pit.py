"""PiT on ImageNet, as published (arXiv 2103.16302; github.com/naver-ai/pit).

    python main.py --config=configs/pit.py:s --workdir=runs/pit_s
    python main.py --config=configs/pit.py:s,setting=distill --config.distill.teacher=regnety_160-a5fe301d.pth

Published top-1 by variant and `setting`:

          vanilla  cutmix  deit  distill
    ti    71.3     72.6    73.0  74.6
    xs    72.4     76.8    78.1  79.1
    s     73.3     79.0    80.9  81.9
    b     76.1     79.9    82.0  84.0

375,300 steps of 1024 images. `deit` (the default) and `distill` are DeiT's code with AdamP, without repeated
augmentation in ti, xs and s, and with 10 warm-up epochs in b, as the authors say in issues of their repository. What
`vanilla` and `cutmix` leave out (RandAugment, erasing, mixup; in `vanilla` CutMix as well) is taken from the paper's
description and not from code. Options, all with `--config.init=WEIGHTS`: `,finetune=384` (DeiT's recipe),
`,transfer=224` and `,probe=224` for other data.
"""

from ml_collections import ConfigDict

from vitpyramid.configs import base, recipes

VARIANTS = ("ti", "xs", "s", "b")
SETTINGS = ("vanilla", "cutmix", "deit", "distill")


def get_config(text: str = "s") -> ConfigDict:
    options = {"setting": SETTINGS, **recipes.ADAPTATIONS}
    variant, chosen = recipes.parse(text, "configs/pit.py", VARIANTS, options)
    setting = chosen.get("setting", "deit")
    config = base.get_config()
    recipes.network(config, f"pit_{variant}")
    recipes.deit(config)
    config.optim.name = "adamp"
    if variant == "b":
        config.schedule.warmup_epochs = 10.0
    else:
        config.data.repeats = 1
    if setting in ("vanilla", "cutmix"):
        recipes.no_augmentation(config)
        config.mix.cutmix = 1.0 if setting == "cutmix" else 0.0
    if setting == "distill":
        recipes.distill(config)
    return recipes.adapt(config, chosen)
