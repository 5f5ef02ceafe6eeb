"""Networks by name."""

import dataclasses
import difflib
import numbers
from collections.abc import Collection, Mapping

import jax.numpy as jnp

from vitpyramid.models import pit, pvt, regnet, rest, t2t_vit, vit
from vitpyramid.models.backbone import Backbone, Variant

FAMILIES = (pvt, pit, t2t_vit, rest, vit, regnet)
VARIANTS: dict[str, Variant] = {name: variant for family in FAMILIES for name, variant in family.VARIANTS.items()}


def list_models(prefix: str = "") -> list[str]:
    """Names that `create_model` knows, in the papers' order, optionally only those that start with `prefix`."""
    return [name for name in VARIANTS if name.startswith(prefix)]


def get_variant(name: str) -> Variant:
    """Facts about the network called `name`. Raises `ValueError` with the nearest names if there is none."""
    if name not in VARIANTS:
        raise unknown(name, VARIANTS)
    return VARIANTS[name]


def unknown(name: str, known: Collection[str]) -> ValueError:
    """The error for a name that is not among those known."""
    near = difflib.get_close_matches(str(name), known, n=3) or list(known)
    return ValueError(f"unknown model {name!r}; expected one of list_models(), such as {', '.join(near)}")


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
