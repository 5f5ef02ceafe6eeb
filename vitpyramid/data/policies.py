"""RandAugment, AutoAugment and 3-Augment as timm defines them, from timm's own strings.

Follows `timm/data/auto_augment.py` of v0.3.4, with which the networks here were trained. Later versions know `p`,
`mmax`, `3a` and `mstd` above 100, which are understood here too; they read `inc0` as no `inc`, as is done here; and
they have dropped `w0`.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image

from vitpyramid.data import image_ops as ops

EXPECTED = (
    '"", "3a"; "v0", "v0r", "original" or "originalr", with or without -mstd0.5; or "rand" with any of '
    "-m9 (magnitude), -n2 (operations), -p0.5 (probability of each), -mstd0.5 (standard deviation of the magnitude), "
    "-mmax10 (its limit), -inc1 (operations that grow with it), -w0 (weights)"
)

_SCALE = 10.0  # magnitude at which operations reach their full range

Draw = Callable[[], Image.Resampling]


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation by timm's name, applied with `probability` at `magnitude`."""

    name: str
    probability: float
    magnitude: float


@dataclasses.dataclass(frozen=True)
class Policy:
    """`draws` of the `choices`, applied one after another.

    Attributes:
      choices: runs of steps.
      draws: how many of them an image gets.
      weights: their probabilities, drawn without replacement; empty: all alike, with replacement.
      noise: standard deviation of the magnitude; infinite: uniform from 0 to the magnitude.
      limit: largest magnitude.
    """

    choices: tuple[tuple[Step, ...], ...]
    draws: int = 1
    weights: tuple[float, ...] = ()
    noise: float = 0.0
    limit: float = _SCALE


def apply(policy: Policy, image: Image.Image, resample: Draw, rng: np.random.Generator) -> Image.Image:
    """One random draw of a policy on an RGB image; `resample` is asked for the filter of each geometric operation."""
    if policy.weights:
        drawn = rng.choice(len(policy.choices), policy.draws, replace=False, p=policy.weights)
    else:
        drawn = rng.integers(len(policy.choices), size=policy.draws)
    for choice in drawn:
        for step in policy.choices[choice]:
            if step.probability >= 1 or rng.random() < step.probability:
                image = apply_step(step.name, _level(policy, step.magnitude, rng), image, resample, rng)
    return image


def apply_step(name: str, level: float, image: Image.Image, resample: Draw, rng: np.random.Generator) -> Image.Image:
    """The operation `name` at magnitude `level`, with a random sign where it has one."""
    if name in _PLAIN:
        return _PLAIN[name](image)
    if name in _GEOMETRIC:
        operation, largest = _GEOMETRIC[name]
        return operation(image, _either_sign(level / _SCALE * largest, rng), resample())
    operation, argument = _GRADED[name]
    return operation(image, argument(level, rng))


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in random order, each by a factor uniform in [max(0, 1 - s), 1 + s].

    torchvision's `ColorJitter(s, s, s)`.
    """
    operations = (ops.brightness, ops.contrast, ops.color)
    for i in rng.permutation(3):
        image = operations[i](image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def parse(text: str) -> Policy | None:
    """The policy that a value of `data.auto_augment` stands for; None for "".

    Raises:
      ValueError: no such policy, naming the key, the value and what was expected.
    """
    try:
        name, *tokens = text.split("-")
        if name == "rand":
            return _rand_augment(_options(tokens, _RAND_OPTIONS))
        if name in _AUTO_AUGMENT:
            return Policy(_AUTO_AUGMENT[name], noise=_noise(_options(tokens, {"mstd": float})))
        if text == "3a":
            return Policy(_THREE_AUGMENT)
        if text == "":
            return None
        raise ValueError(f"no policy {name!r}")
    except ValueError as error:
        raise ValueError(f"data.auto_augment = {text!r}: {error}; expected {EXPECTED}") from error


_RAND_OPTIONS = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int, "w": int}


def _options(tokens: list[str], kinds: dict[str, type]) -> dict[str, float]:
    options = {}
    for token in tokens:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", token)
        key = match and match[1]
        if key not in kinds or key in options:
            raise ValueError(f"{token!r} does not belong there")
        options[key] = kinds[key](match[2])
    return options


def _noise(options: dict[str, float]) -> float:
    noise = options.get("mstd", 0.0)
    return math.inf if noise > 100 else noise


def _rand_augment(options: dict[str, float]) -> Policy:
    increasing, weighted, draws = options.get("inc", 0), "w" in options, options.get("n", 2)
    probability = options.get("p", 0.5)
    names = [_INCREASING.get(name, name) if increasing else name for name in _RAND_AUGMENT]
    weights = tuple(_RAND_AUGMENT.values()) if weighted else ()
    if probability > 1:
        raise ValueError(f"p{probability} is no probability")
    if draws < 1:
        raise ValueError("n0 is no number of operations")
    if weighted and (options["w"] != 0 or increasing or draws > np.count_nonzero(weights)):
        raise ValueError("there is only -w0, without -inc1, for at most 13 operations")
    return Policy(
        choices=tuple((Step(name, probability, options.get("m", _SCALE)),) for name in names),
        draws=draws,
        weights=weights,
        noise=_noise(options),
        limit=options.get("mmax", _SCALE),
    )


def _level(policy: Policy, magnitude: float, rng: np.random.Generator) -> float:
    if policy.noise == math.inf:
        magnitude = rng.uniform(0, magnitude)
    elif policy.noise > 0:
        magnitude = rng.normal(magnitude, policy.noise)
    return max(0.0, min(magnitude, policy.limit))


def _either_sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _enhance(level: float, rng: np.random.Generator) -> float:
    return level / _SCALE * 1.8 + 0.1


def _enhance_increasing(level: float, rng: np.random.Generator) -> float:
    return max(0.1, 1.0 + _either_sign(level / _SCALE * 0.9, rng))


def _whole(level: float, full: int) -> int:
    return int(level / _SCALE * full)


_PLAIN = {
    "AutoContrast": ops.auto_contrast,
    "Equalize": ops.equalize,
    "Invert": ops.invert,
    "Grey": ops.grey,
}

# The argument at full magnitude; its sign is random.
_GEOMETRIC = {
    "Rotate": (ops.rotate, 30.0),
    "ShearX": (ops.shear_x, 0.3),
    "ShearY": (ops.shear_y, 0.3),
    "TranslateXRel": (ops.translate_x, 0.45),
    "TranslateYRel": (ops.translate_y, 0.45),
}

# The limits matter above the full magnitude only (mmax).
_GRADED = {
    "Posterize": (ops.posterize, lambda level, rng: min(8, _whole(level, 4))),
    "PosterizeIncreasing": (ops.posterize, lambda level, rng: max(0, 4 - _whole(level, 4))),
    "PosterizeOriginal": (ops.posterize, lambda level, rng: min(8, _whole(level, 4) + 4)),
    "Solarize": (ops.solarize, lambda level, rng: min(256, _whole(level, 256))),
    "SolarizeIncreasing": (ops.solarize, lambda level, rng: 256 - min(256, _whole(level, 256))),
    "SolarizeAdd": (ops.solarize_add, lambda level, rng: min(128, _whole(level, 110))),
    "Color": (ops.color, _enhance),
    "ColorIncreasing": (ops.color, _enhance_increasing),
    "Contrast": (ops.contrast, _enhance),
    "ContrastIncreasing": (ops.contrast, _enhance_increasing),
    "Brightness": (ops.brightness, _enhance),
    "BrightnessIncreasing": (ops.brightness, _enhance_increasing),
    "Sharpness": (ops.sharpness, _enhance),
    "SharpnessIncreasing": (ops.sharpness, _enhance_increasing),
    "GaussianBlur": (ops.gaussian_blur, lambda level, rng: rng.uniform(0.1, 2.0)),
}

# RandAugment's fifteen, with the weights of "w0".
_RAND_AUGMENT = {
    "AutoContrast": 0.025,
    "Equalize": 0.005,
    "Invert": 0.0,
    "Rotate": 0.3,
    "Posterize": 0.0,
    "Solarize": 0.005,
    "SolarizeAdd": 0.005,
    "Color": 0.025,
    "Contrast": 0.005,
    "Brightness": 0.005,
    "Sharpness": 0.025,
    "ShearX": 0.2,
    "ShearY": 0.2,
    "TranslateXRel": 0.1,
    "TranslateYRel": 0.1,
}

_INCREASING = {
    name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
}


def _sub_policies(table: str, posterize: str) -> tuple[tuple[Step, ...], ...]:
    """Lines of "operation probability magnitude, operation probability magnitude"."""
    rows = [[step.split() for step in row.split(",")] for row in table.strip().splitlines()]
    return tuple(
        tuple(Step(posterize if name == "Posterize" else name, float(p), float(m)) for name, p, m in row)
        for row in rows
    )


# Of the TPU implementation of EfficientNet, which no paper describes.
_V0 = """
Equalize 0.8 1, ShearY 0.8 4
Color 0.4 9, Equalize 0.6 3
Color 0.4 1, Rotate 0.6 8
Solarize 0.8 3, Equalize 0.4 7
Solarize 0.4 2, Solarize 0.6 2
Color 0.2 0, Equalize 0.8 8
Equalize 0.4 8, SolarizeAdd 0.8 3
ShearX 0.2 9, Rotate 0.6 8
Color 0.6 1, Equalize 1.0 2
Invert 0.4 9, Rotate 0.6 0
Equalize 1.0 9, ShearY 0.6 3
Color 0.4 7, Equalize 0.6 0
Posterize 0.4 6, AutoContrast 0.4 7
Solarize 0.6 8, Color 0.6 9
Solarize 0.2 4, Rotate 0.8 9
Rotate 1.0 7, TranslateYRel 0.8 9
ShearX 0.0 0, Solarize 0.8 4
ShearY 0.8 0, Color 0.6 4
Color 1.0 0, Rotate 0.6 2
Equalize 0.8 4, Equalize 0.0 8
Equalize 1.0 4, AutoContrast 0.6 2
ShearY 0.4 7, SolarizeAdd 0.6 7
Posterize 0.8 2, Solarize 0.6 10
Solarize 0.6 8, Equalize 0.6 1
Color 0.8 6, Rotate 0.4 5
"""

# Of the paper, https://arxiv.org/abs/1805.09501, for ImageNet.
_ORIGINAL = """
Posterize 0.4 8, Rotate 0.6 9
Solarize 0.6 5, AutoContrast 0.6 5
Equalize 0.8 8, Equalize 0.6 3
Posterize 0.6 7, Posterize 0.6 6
Equalize 0.4 7, Solarize 0.2 4
Equalize 0.4 4, Rotate 0.8 8
Solarize 0.6 3, Equalize 0.6 7
Posterize 0.8 5, Equalize 1.0 2
Rotate 0.2 3, Solarize 0.6 8
Equalize 0.6 8, Posterize 0.4 6
Rotate 0.8 8, Color 0.4 0
Rotate 0.4 9, Equalize 0.6 2
Equalize 0.0 7, Equalize 0.8 8
Invert 0.6 4, Equalize 1.0 8
Color 0.6 4, Contrast 1.0 8
Rotate 0.8 8, Color 1.0 2
Color 0.8 8, Solarize 0.8 7
Sharpness 0.4 7, Invert 0.6 8
ShearX 0.6 5, Equalize 1.0 9
Color 0.4 0, Equalize 0.6 3
Equalize 0.4 7, Solarize 0.2 4
Solarize 0.6 5, AutoContrast 0.6 5
Invert 0.6 4, Equalize 1.0 8
Color 0.6 4, Contrast 1.0 8
Equalize 0.8 8, Equalize 0.6 3
"""

# An "r" stands for the posterize of Google's research code, which drops bits as the magnitude grows.
_AUTO_AUGMENT = {
    "v0": _sub_policies(_V0, "Posterize"),
    "v0r": _sub_policies(_V0, "PosterizeIncreasing"),
    "original": _sub_policies(_ORIGINAL, "PosterizeOriginal"),
    "originalr": _sub_policies(_ORIGINAL, "PosterizeIncreasing"),
}

# DeiT III (https://arxiv.org/abs/2204.07118), `augment.py`: one of the three, always.
_THREE_AUGMENT = ((Step("Grey", 1, 0),), (Step("Solarize", 1, 5),), (Step("GaussianBlur", 1, 0),))
