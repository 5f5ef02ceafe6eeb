"""The optimizer of a config: AdamW, AdamP or SGD, with rules over parameter paths."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from vitpyramid.models.backbone import Backbone
from vitpyramid.train.adamp import scale_by_adamp
from vitpyramid.train.schedule import Horizon, make_schedule


class Optimizer(NamedTuple):
    """What a training step needs.

    Attributes:
      tx: turns gradients into updates.
      trainable: parameters that are not frozen: a tree of bools.
    """

    tx: optax.GradientTransformation
    trainable: dict


def decay_mask(params, no_weight_decay: tuple[str, ...]):
    """True for each parameter that is decayed: not vectors (biases, norms), not those named in `no_weight_decay`.

    timm's `add_weight_decay` rule, as PVT, PiT, T2T-ViT and ResT were trained with.
    """

    # By name: in stacked blocks vectors have a second axis.
    exempt = {"bias", "scale", *no_weight_decay}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in exempt, params)


def all_but_norms(params):
    """True for each parameter that is not of a norm: of a module with a `scale`. detectron2's `WEIGHT_DECAY_NORM`."""
    norms = {path[:-1] for path in traverse_util.flatten_dict(params) if path[-1] == "scale"}
    return jax.tree_util.tree_map_with_path(lambda path, _: tuple(part.key for part in path[:-1]) not in norms, params)


def make_optimizer(config: ConfigDict, horizon: Horizon, params, model: Backbone) -> Optimizer:
    """The optimizer of a config for parameters of `model`, which says what is not decayed and what a layer is.

    Gradients are clipped by the global norm of the trainable ones, then follow the rule `optim.name`, then the learning
    rate of each parameter: the schedule with the peak that `optim.lr_rules` gives it, times `optim.layer_decay` once
    for every layer between it and the head.

    Args:
      params: tree of arrays or shapes.

    Raises:
      ValueError: a parameter that no rule of `optim.lr_rules` covers, or a rule that covers none; with
        `optim.layer_decay`, a parameter of no layer that the model declares.
    """
    optim = config.optim
    factors = lr_factors(params, optim.lr_rules)
    trainable = jax.tree.map(lambda factor: factor > 0, factors)
    scales = jax.tree.map(lambda _: 1.0, params)
    if optim.layer_decay != 1:
        scales = jax.tree.map(lambda depth: optim.layer_decay**depth, layers_to_head(params, model))

    def decayed(tree):
        if not optim.decay_vectors:
            return decay_mask(tree, model.no_weight_decay)
        return jax.tree.map(lambda _: True, tree) if optim.decay_norms else all_but_norms(tree)

    if optim.name == "adamp":
        rule = [scale_by_adamp(optim.beta1, optim.beta2, optim.eps, optim.weight_decay, decayed, model.stages)]
    elif optim.name == "sgd":  # PyTorch's: decay joins the gradient, before the momentum
        rule = [optax.add_decayed_weights(optim.weight_decay, decayed), optax.trace(optim.momentum)]
    else:
        rule = [
            optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps),
            optax.add_decayed_weights(optim.weight_decay, decayed),
        ]
    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        *rule,
        _scale_by_learning_rates(config, horizon, factors, scales),
    )
    labels = jax.tree.map(lambda moves: "trainable" if moves else "frozen", trainable)
    if not all(jax.tree.leaves(trainable)):
        tx = optax.partition({"trainable": tx, "frozen": optax.set_to_zero()}, labels)
    return Optimizer(tx, trainable)


def lr_factors(params, rules: tuple[tuple[str, float], ...]):
    """For each parameter the factor of the first rule `(pattern, factor)` whose pattern is found in its path.

    Paths are as in `params`, joined by "/". Without rules every factor is 1. Zero freezes a parameter.

    Raises:
      ValueError: a parameter that no rule covers, or a rule that covers none.
    """
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    if not rules:
        return jax.tree.map(lambda _: 1.0, params)
    matches = {path: next((rule for rule in rules if re.search(rule[0], path)), None) for path in paths}
    if uncovered := [path for path, rule in matches.items() if rule is None]:
        raise ValueError(f"optim.lr_rules: no rule covers {', '.join(uncovered[:5])}; ('.*', 1.0) at the end would")
    for rule in rules:
        if rule not in matches.values():
            raise ValueError(f"optim.lr_rules: {rule!r} covers no parameter that an earlier rule leaves")
    return traverse_util.unflatten_dict({path: float(rule[1]) for path, rule in matches.items()}, sep="/")


def layers_to_head(params, model: Backbone):
    """For each parameter the number of layers from its own to the head: 0 for the head and the last norm.

    A layer is a block; what stands before a stage counts with the last block of the stage before, what stands before
    the first block is a layer of its own (BEiT's rule, arXiv 2106.08254, appendix).

    Raises:
      ValueError: a parameter that is in none of `model.stages` and not in `model.after`.
    """
    layers = dict.fromkeys(model.after, 0)
    left = sum(len(stage.blocks) for stage in model.stages)
    for stage in model.stages:
        layers |= dict.fromkeys(stage.before, left + 1)
        layers |= {block: left - j for j, block in enumerate(stage.blocks)}
        left -= len(stage.blocks)

    def depth(path: str) -> int:
        parts = path.split("/")
        layer = next((part for n in range(len(parts)) if (part := "/".join(parts[: n + 1])) in layers), None)
        if layer is None:
            raise ValueError(f"{path}: expected in the stages of {type(model).__name__} or behind them, it is in none")
        return layers[layer]

    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: depth(path) for path in flat}, sep="/")


def _scale_by_learning_rates(config: ConfigDict, horizon: Horizon, factors, scales) -> optax.GradientTransformation:
    """Multiplies each update by minus its own learning rate."""
    schedules = {factor: make_schedule(config, horizon, factor) for factor in set(jax.tree.leaves(factors)) if factor}

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rates = {factor: schedule(state.count) for factor, schedule in schedules.items()}

        def move(update, factor, scale):
            return (
                update
                if isinstance(update, optax.MaskedNode)
                else -(rates[factor] * scale).astype(update.dtype) * update
            )

        updates = jax.tree.map(move, updates, factors, scales, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
