"""Reads a config's file, checks it before any work starts, and compares it with the config of an earlier run."""

import difflib
import functools
import importlib.util
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vitpyramid import configs
from vitpyramid.tasks import TASKS
from vitpyramid.tasks.rules import BATCH, EPOCHS, FRACTION, SHARE, Rule, are_patterns, between, one_of
from vitpyramid.tasks.task import ConfigError

# Keys that change neither what is learned nor how it is measured: a run may be resumed with others.
NEUTRAL = (
    "init",
    "data.data_dir",
    "data.threads",
    "data.workers",
    "mesh.",
    "log.",
    "profile.",
    "eval.",
    "checkpoint.",
    "compile_cache",
)

# Of the keys that every task has; the others' rules are in the task's module. Every numeric key has a rule (a test
# checks it).
RULES = {
    "task": one_of(*TASKS),
    "seed": between(0, 2**31 - 1),
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "optim.name": one_of("adamw", "adamp", "sgd"),
    "optim.lr": between(0, 100, above=True),
    "optim.lr_batch": between(0, BATCH.high),
    "optim.beta1": FRACTION,
    "optim.beta2": FRACTION,
    "optim.eps": between(0, 1, above=True),
    "optim.momentum": FRACTION,
    "optim.weight_decay": between(0, 100),
    "optim.clip_norm": between(0, 1e6),
    "optim.accumulate": BATCH,
    "optim.layer_decay": SHARE,
    "optim.lr_rules": are_patterns(between(0, 1e6)),
    "schedule.name": one_of("cosine", "constant", "step", "poly"),
    "schedule.drops": Rule(lambda v: list(v) == sorted(v) and all(map(EPOCHS.allows, v)), "rising numbers of epochs"),
    "schedule.power": between(0, 10, above=True),
    "schedule.per": one_of("step", "epoch"),
    "schedule.lag": between(0, 1),
    "schedule.warmup_epochs": between(0, EPOCHS.high),
    "schedule.warmup_lr": between(0, 100),
    "schedule.min_lr": between(0, 100),
    "schedule.cooldown_epochs": between(0, EPOCHS.high),
    "ema.decay": FRACTION,
    "mesh.fsdp": BATCH,
    "log.every_steps": between(1, 10**9),
    "profile.start": between(0, 10**9),
    "profile.steps": between(0, 1000),
    "eval.batch_size": BATCH,
    "eval.every_epochs": EPOCHS,
    "checkpoint.every_epochs": EPOCHS,
    "checkpoint.keep": between(1, 10**6),
}


def load_config(name: str | os.PathLike) -> ConfigDict:
    """The config that a file describes, locked: keys can be given other values, none can be added.

    Args:
      name: `FILE` or `FILE:TEXT`, where the file's `get_config` takes TEXT, as in "quickstart.py:rest". FILE is a path,
        or one of the configs that come with the package, where no such path is: "pvt.py", "configs/pvt.py", "pvt".

    Raises:
      ConfigError: no such file, or one without `get_config`. What the file itself raises is passed on.
    """
    path, colon, text = find_config(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec) if spec else None
    if spec:
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config {path}: expected a Python file with a function get_config")
    config = module.get_config(text) if colon else module.get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config {path}: expected get_config to return a ConfigDict, got {type(config).__name__}")
    return config.lock()


def find_config(name: str | os.PathLike) -> str:
    """`FILE[:TEXT]` with the path of a file that is there; `name` as in `load_config`, which says what it raises."""
    file, colon, text = os.fspath(name).partition(":")
    own, ours = Path(file).expanduser(), Path(configs.__path__[0])
    inside = Path(*own.parts[1:]) if own.parts[:1] == ("configs",) else own
    candidates = (own, ours / inside, ours / inside.with_suffix(".py")) if file else ()
    for path in candidates:
        if path.is_file():
            return f"{path}{colon}{text}"
    names = sorted(path.name for path in ours.glob("*.py") if path.name not in ("base.py", "recipes.py"))
    raise ConfigError(f"config {file!r}: no such file; with the package come {', '.join(names)}")


def reference() -> ConfigDict:
    """A config with every key there is, to check others against."""
    return load_config(Path(configs.__path__[0]) / "base.py")


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


def nearest(name: str, names: Iterable[str]) -> str:
    """For a message about a name that does not exist: "; did you mean optim.lr?", or nothing if none is like it.

    Names are alike as a whole, or in their last parts: "lr", "model.lr" and "optim.rl" are near "optim.lr".
    """
    names = sorted(names)
    last = name.rpartition(".")[2]
    near = [known for known in names if known.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def validate(config: ConfigDict, reference: ConfigDict, device_count: int, evaluation: bool = False) -> None:
    """Raises `ConfigError` unless `config` has just the keys and types of `reference`, with values that can be run.

    `evaluation`: nothing will be trained, so what only training needs may be missing.
    """
    flat, known = flatten(config), flatten(reference)
    problems = [f"{key} = {flat[key]!r}: no such key{nearest(key, known)}" for key in flat if key not in known]
    problems += [f"{key}: missing" for key in known if key not in flat]
    task = TASKS.get(flat.get("task"))
    # All configs have the keys of all tasks; of one key the task's own rule counts.
    rules = functools.reduce(operator.or_, [module.RULES for module in (*TASKS.values(), task) if module], RULES)
    for key in flat.keys() & known.keys():
        value = flat[key]
        if not _same_type(value, known[key]):
            problems.append(f"{key} = {value!r}: expected {_type_name(known[key])}")
        elif key in rules and not rules[key].holds(value):
            problems.append(f"{key} = {value!r}: expected {rules[key].expected}")
    if not problems:
        problems = _cross_checks(config, device_count) + task.check(config, evaluation)
    if problems:
        raise ConfigError("the config cannot be run:\n  " + "\n  ".join(sorted(problems)))


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
