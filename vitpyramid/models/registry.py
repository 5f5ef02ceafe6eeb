"""Networks by name."""

import dataclasses
import difflib
import fnmatch
import math
import numbers
import re
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from vitpyramid.models import pit, pvt, regnet, rest, t2t_vit, vit
from vitpyramid.models.backbone import Backbone, Variant

FAMILIES = (pvt, pit, t2t_vit, rest, vit, regnet)
VARIANTS: dict[str, Variant] = {name: variant for family in FAMILIES for name, variant in family.VARIANTS.items()}


def list_models(pattern: str = "") -> list[str]:
    """Names that `create_model` knows, in the papers' order.

    Args:
      pattern: what names begin with, or, if it has one of `*?[`, what they look like as a whole: "pit", "pvt_*",
        "*_distilled"; "": all.

    Raises:
      ValueError: there is none.
    """
    return names_like(pattern, VARIANTS)


def names_like(pattern: str, known: Collection[str]) -> list[str]:
    """Those of the names known that `list_models` gives for a pattern."""
    shape = pattern if set(pattern) & set("*?[") else f"{pattern}*"
    names = [name for name in known if fnmatch.fnmatchcase(name, shape)]
    if not names:
        raise ValueError(f"no model is called {pattern!r}; {suggestion(pattern, known)}")
    return names


def get_variant(name: str) -> Variant:
    """Facts about the network called `name`. Raises `ValueError` with the nearest names if there is none."""
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; {suggestion(str(name), VARIANTS)}")
    return VARIANTS[name]


def suggestion(name: str, known: Collection[str]) -> str:
    """What to say of a name or pattern that fits nothing: the nearest names, whatever their case and separators."""
    plain = {_plain(name): name for name in known}
    alike = fnmatch.filter(plain, f"{_plain(name)}*")[:3] if any(map(str.isalnum, name)) else []
    near = [plain[match] for match in alike or difflib.get_close_matches(_plain(name), plain, n=3)]
    return "expected one of list_models()" + (f", such as {', '.join(near)}" if near else "")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9*?\[\]]", "", name.lower())


def model_facts(name: str) -> dict:
    """What is known of the network called `name`, without making it.

    Returns:
      What can be written as JSON: `name`, `family` (the module's class), `parameters` (trainable, with the head),
      `gmacs` (published multiply-accumulates at 224 x 224, in units of 1e9; None where none were), `top1` (published,
      ImageNet, in percent; None likewise), `num_classes`, `image_size`, of each level, finest first, `strides` (input
      pixels per cell) and `dims` (channels), and of the authors' evaluation `crop` (share of a side), `interpolation`,
      `mean` and `std` (of channels in [0, 1]).

    Raises:
      ValueError: unknown `name`.
    """
    variant = get_variant(name)
    model = variant.model
    return {
        "name": name,
        "family": type(model).__name__,
        "parameters": variant.params,
        "gmacs": variant.gmacs,
        "top1": variant.top1,
        "num_classes": model.num_classes,
        "image_size": model.image_size,
        "strides": model.strides,
        "dims": model.level_dims,
        "crop": variant.crop,
        "interpolation": variant.interpolation,
        "mean": variant.mean,
        "std": variant.std,
    }


def register_model(name: str, model: Backbone, like: str | None = None) -> None:
    """Gives a network of one's own a name, by which everything in the package then knows it.

    A name is known where this has been called: a config file calls it for the run that it describes, a program before
    it loads that run's weights.

    Args:
      name: small letters, digits and underscores; none that another network has.
      model: a module without weights, such as `create_model("pvt_small", depths=(2, 2, 4, 2))`, or one of a family of
        one's own. Its `num_classes` and `image_size` are what the name stands for.
      like: whose crop, interpolation, mean and std images are evaluated with; None: 0.875, bicubic, ImageNet's.

    Raises:
      ValueError: a name that cannot be one, or that another network has; unknown `like`; whatever the module raises
        where it cannot be made.
      TypeError: `model` is no `Backbone`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name = {name!r}: expected small letters, digits and underscores")
    if not isinstance(model, Backbone):
        raise TypeError(f"model is of {type(model).__name__}, expected a Backbone, as create_model gives")
    if name in VARIANTS and VARIANTS[name].model != model:
        raise ValueError(f"name = {name!r}: another network has this name")
    images = jax.ShapeDtypeStruct((1, *model.height_width, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    facts = {"params": count, "gmacs": None, "top1": None}
    VARIANTS[name] = dataclasses.replace(get_variant(like), model=model, **facts) if like else Variant(model, count)


def create_model(name: str, **overrides) -> Backbone:
    """The network called `name`, as a Flax module without weights.

    Args:
      name: one of `list_models()`.
      **overrides: fields of the family's module to change, e.g. `num_classes`, `dtype`, `drop_path_rate`, `image_size`.

    Returns:
      A module. `model.init(rng, images)` makes variables for images `[B, H, W, 3]`, normalised floats;
      `model.apply(variables, images)` gives logits `[B, num_classes]` in at least float32;
      `model.apply(variables, images, method="features")` gives a tuple of `Level`, finest first.

    Raises:
      ValueError: unknown `name`; an option that every family has with a value that none can have.
      TypeError: an override that the family does not have.
    """
    model = get_variant(name).model
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("name", "parent")]
    for key in overrides:
        if key not in fields:
            raise TypeError(f"{name} has no option {key!r}; expected one of {', '.join(fields)}")
    check_options(overrides)
    return model.clone(**overrides)


def check_options(overrides: Mapping) -> None:
    """Raises `ValueError` for an option that every network has with a value that none can have."""
    for key, value in overrides.items():
        allows, expected = _OPTIONS.get(key, (None, ""))
        if allows and not allows(value):
            raise ValueError(f"{key} = {value!r}: expected {expected}")


def _is_count(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def _is_rate(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < 1


def _is_size(value) -> bool:
    return _is_count(value) or (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_count, value)))


def _is_float_type(value) -> bool:
    try:
        return value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


_RATE = _is_rate, "a number of at least 0 and less than 1"
_FLAG = lambda value: isinstance(value, bool), "True or False"
_OPTIONS = {
    "num_classes": (_is_count, "an integer of at least 1"),
    "image_size": (_is_size, "a side in pixels, or (height, width)"),
    "drop_rate": _RATE,
    "token_drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "remat": _FLAG,
    "scan": _FLAG,
    "freeze_statistics": _FLAG,
    "dtype": (_is_float_type, "a floating type, such as jnp.bfloat16"),
}
