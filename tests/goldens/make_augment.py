"""Makes `augment.npz`: timm's image operations on a piece of a photo and its AutoAugment tables. Tests do not run this.

    python tests/goldens/make_augment.py

Needs scikit-image, timm and what timm needs, see `make_deit.py`; the file is of timm 1.0.31 on Pillow 13.0.0. Keys:
`photo`, uint8 [18, 24, 3]; `NAME LEVEL SIGN FILTER`, timm's operation NAME at magnitude LEVEL on it, where SIGN is the
argument's; `policy NAME`, lines of `operation probability magnitude`.
"""

import pathlib
import random
import sys

import numpy as np
import skimage.data
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from make_deit import import_timm  # noqa: E402

LEVELS = (3.3, 9.0)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
SIGNED = (*GEOMETRIC, "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
OTHERS = ("AutoContrast", "Equalize", "Invert", "Posterize", "PosterizeIncreasing", "PosterizeOriginal", "Solarize",
          "SolarizeIncreasing", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness")  # fmt: skip


def main():
    import_timm()
    from timm.data import auto_augment

    photo = Image.fromarray(skimage.data.astronaut()).crop((180, 60, 276, 132)).resize((24, 18))
    arrays = {"photo": np.asarray(photo)}
    for name in (*SIGNED, *OTHERS):
        for level in LEVELS:
            for sign in "+-" if name in SIGNED else "+":
                for filter_name, resample in FILTERS.items() if name in GEOMETRIC else [("none", None)]:
                    random.random = lambda sign=sign: 0.9 if sign == "-" else 0.1
                    hparams = {"img_mean": (124, 116, 104), "interpolation": resample}
                    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
                    arrays[f"{name} {level} {sign} {filter_name}"] = np.asarray(operation(photo))
    for policy in ("v0", "v0r", "original", "originalr"):
        sub_policies = auto_augment.auto_augment_policy(policy, {})
        steps = [[f"{step.name} {step.prob:g} {step.magnitude:g}" for step in pair] for pair in sub_policies]
        arrays[f"policy {policy}"] = np.array([", ".join(pair) for pair in steps])
    np.savez_compressed(FOLDER / "augment.npz", **arrays)


if __name__ == "__main__":
    main()
