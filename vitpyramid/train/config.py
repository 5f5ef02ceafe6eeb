"""Checks a config before any work starts, and compares it with the config of an earlier run."""

import numbers
import re
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from vitpyramid.models.registry import list_models

# Keys that change neither what is learned nor how it is measured: a run may be resumed with others.
NEUTRAL = (
    "init",
    "data.data_dir",
    "data.threads",
    "data.workers",
    "mesh.",
    "log.",
    "eval.",
    "checkpoint.",
    "compile_cache",
)

_POSITIVE = (lambda v: v > 0, "more than 0")
_AT_LEAST_ONE = (lambda v: v >= 1, "at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "0 or more")
_FRACTION = (lambda v: 0 <= v < 1, "at least 0 and less than 1")
_PROBABILITY = (lambda v: 0 <= v <= 1, "between 0 and 1")

_CHANNELS = (lambda v: len(v) in (0, 3) and all(x > 0 for x in v), "three numbers more than 0, or none")


def _one_of(*values: str) -> tuple[Callable, str]:
    return (lambda v: v in values), "one of " + ", ".join(map(repr, values))


def _are_rules(rules: list) -> bool:
    try:
        return all(re.compile(pattern) and factor >= 0 for pattern, factor in rules)
    except (ValueError, re.error):  # not pairs; no regular expression
        return False


# Every numeric key has a rule (a test checks it).
RULES = {
    "seed": (lambda v: 0 <= v < 2**31, "at least 0 and less than 2**31"),
    "batch_size": _AT_LEAST_ONE,
    "epochs": _POSITIVE,
    "data.crop_padding": _NOT_NEGATIVE,
    "data.interpolation": _one_of("bicubic", "bilinear", "random"),
    "data.color_jitter": _NOT_NEGATIVE,
    "data.repeats": _AT_LEAST_ONE,
    "data.eval_interpolation": _one_of("bicubic", "bilinear"),
    "data.on_corrupt": _one_of("error", "skip"),
    "data.mean": _CHANNELS,
    "data.std": _CHANNELS,
    "mix.mixup": _NOT_NEGATIVE,
    "mix.cutmix": _NOT_NEGATIVE,
    "mix.prob": _PROBABILITY,
    "mix.switch_prob": _PROBABILITY,
    "mix.mode": _one_of("batch", "pair", "elem"),
    "erase.prob": _PROBABILITY,
    "erase.mode": _one_of("pixel", "rand", "const"),
    "erase.count": _AT_LEAST_ONE,
    "optim.name": _one_of("adamw", "adamp", "sgd"),
    "optim.momentum": _FRACTION,
    "optim.accumulate": _AT_LEAST_ONE,
    "optim.layer_decay": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "optim.lr_rules": (_are_rules, "(pattern, factor) pairs with a regular expression and a factor of 0 or more"),
    "schedule.name": _one_of("cosine", "constant"),
    "schedule.per": _one_of("step", "epoch"),
    "schedule.lag": (lambda v: v in (0, 1), "0 or 1"),
    "schedule.cooldown_epochs": _NOT_NEGATIVE,
    "distill.kind": _one_of("hard", "soft"),
    "distill.alpha": _PROBABILITY,
    "distill.tau": _POSITIVE,
    "model.name": (lambda v: v in list_models(), "one of vitpyramid.list_models()"),
    "model.num_classes": _NOT_NEGATIVE,
    "model.drop_rate": _FRACTION,
    "model.drop_path_rate": _FRACTION,
    "model.dtype": (lambda v: v in ("bfloat16", "float32"), '"bfloat16" or "float32"'),
    "data.image_size": (lambda v: v >= 32, "at least 32"),
    "data.crop_scale": (lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1, "(low, high) with 0 < low <= high <= 1"),
    "data.crop_ratio": (lambda v: len(v) == 2 and 0 < v[0] <= v[1], "(low, high) with 0 < low <= high"),
    "data.flip": _PROBABILITY,
    "data.eval_crop": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "data.threads": _AT_LEAST_ONE,
    "data.workers": _NOT_NEGATIVE,
    "optim.lr": _POSITIVE,
    "optim.lr_batch": _NOT_NEGATIVE,
    "optim.beta1": _FRACTION,
    "optim.beta2": _FRACTION,
    "optim.eps": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "schedule.warmup_lr": _NOT_NEGATIVE,
    "schedule.min_lr": _NOT_NEGATIVE,
    "loss.label_smoothing": _FRACTION,
    "ema.decay": _FRACTION,
    "mesh.fsdp": _AT_LEAST_ONE,
    "log.every_steps": _AT_LEAST_ONE,
    "eval.batch_size": _AT_LEAST_ONE,
    "eval.every_epochs": _POSITIVE,
    "checkpoint.every_epochs": _POSITIVE,
    "checkpoint.keep": _AT_LEAST_ONE,
}


class ConfigError(ValueError):
    """A config that cannot be run; the message names each key, its value and what was expected."""


def flatten(config: Mapping, prefix: str = "") -> dict:
    """`{"optim.lr": 5e-4, ...}` of a nested config; tuples become lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _plain(value)
    return flat


def _plain(value):
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def validate(config: ConfigDict, reference: ConfigDict, device_count: int) -> None:
    """Raises `ConfigError` unless `config` has just the keys and types of `reference`, with values that can be run."""
    flat, known = flatten(config), flatten(reference)
    problems = [f"{key} = {flat[key]!r}: no such key" for key in flat if key not in known]
    problems += [f"{key}: missing" for key in known if key not in flat]
    for key in flat.keys() & known.keys():
        value = flat[key]
        if not _same_type(value, known[key]):
            problems.append(f"{key} = {value!r}: expected {_type_name(known[key])}")
        elif key in RULES and not _holds(RULES[key][0], value):
            problems.append(f"{key} = {value!r}: expected {RULES[key][1]}")
    if not problems:
        problems = _cross_checks(config, device_count)
    if problems:
        raise ConfigError("the config cannot be run:\n  " + "\n  ".join(sorted(problems)))


def _holds(rule: Callable, value) -> bool:
    try:
        return bool(rule(value))
    except TypeError:  # tuples of something else
        return False


def _same_type(value, example) -> bool:
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int):
        return isinstance(value, numbers.Integral)
    if isinstance(example, float):
        return isinstance(value, numbers.Real)
    if isinstance(example, list):
        return isinstance(value, list)
    return isinstance(value, str)


def _type_name(example) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", list: "a tuple", str: "a string"}
    return names[type(example)]


def _cross_checks(config: ConfigDict, device_count: int) -> list[str]:
    problems = []
    for key, size in (("batch_size", config.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if size % device_count:
            problems.append(f"{key} = {size}: expected a multiple of the {device_count} devices")
    if device_count % config.mesh.fsdp:
        problems.append(f"mesh.fsdp = {config.mesh.fsdp}: expected a divisor of the {device_count} devices")
    if config.model.name.endswith("_distilled") and not config.distill.teacher:
        problems.append("distill.teacher = '': expected a teacher's weights, as the network has a head for it")
    parts = config.optim.accumulate
    if config.batch_size % (parts * device_count):
        problems.append(
            f"optim.accumulate = {parts}: expected batch_size = {config.batch_size} to be a multiple of it times the "
            f"{device_count} devices"
        )
    if config.model.scan and config.optim.layer_decay != 1:
        problems.append(f"optim.layer_decay = {config.optim.layer_decay}: expected 1 with model.scan = True")
    if config.model.scan and not config.model.remat:
        problems.append("model.scan = True: expected model.remat = True with it")
    for key in ("warmup_epochs", "cooldown_epochs"):
        if config.schedule[key] > config.epochs:
            problems.append(f"schedule.{key} = {config.schedule[key]}: expected at most epochs = {config.epochs}")
    return problems


def differences(config: Mapping, earlier: Mapping) -> list[str]:
    """Lines `key: earlier value -> value` for the keys, other than `NEUTRAL` ones, in which two configs differ."""
    new, old = flatten(config), flatten(earlier)
    keys = [key for key in sorted(new | old) if not key.startswith(NEUTRAL)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if new.get(key) != old.get(key)]
