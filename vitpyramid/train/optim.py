"""The optimizer of a config: AdamW, AdamP or SGD, with rules over parameter paths."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from vitpyramid.train.adamp import scale_by_adamp
from vitpyramid.train.schedule import Horizon, make_schedule

# A block's path: the stage's number, if its family has stages, and the block's.
_BLOCK = re.compile(r"(?:block(\d)_(\d+)|stage(\d)_(\d+)|transformers_(\d)/blocks_(\d+)|blocks_(\d+))/")
# What stands before a stage: its number. What has no number stands before the first.
_ENTRANCE = re.compile(r"(?:patch_embed|patch_embedding_|pos_embed)(\d)|pools_(\d)/")


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


def make_optimizer(config: ConfigDict, horizon: Horizon, params, no_weight_decay: tuple[str, ...]) -> Optimizer:
    """The optimizer of a config for parameters of these shapes.

    Gradients are clipped by the global norm of the trainable ones, then follow the rule `optim.name`, then the learning
    rate of each parameter: the schedule with the peak that `optim.lr_rules` gives it, times `optim.layer_decay` once
    for every layer between it and the head.

    Args:
      params: tree of arrays or shapes.

    Raises:
      ValueError: a parameter that no rule of `optim.lr_rules` covers, or a rule that covers none.
    """
    optim = config.optim
    factors = lr_factors(params, optim.lr_rules)
    trainable = jax.tree.map(lambda factor: factor > 0, factors)
    scales = jax.tree.map(lambda depth: optim.layer_decay**depth, layers_to_head(params))

    def decayed(tree):
        return jax.tree.map(lambda _: True, tree) if optim.decay_vectors else decay_mask(tree, no_weight_decay)

    if optim.name == "adamp":
        rule = [scale_by_adamp(optim.beta1, optim.beta2, optim.eps, optim.weight_decay, decayed)]
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


def layers_to_head(params):
    """For each parameter the number of layers from its own to the head: 0 for the head and the last norm.

    A layer is a block; what stands before a stage counts with the last block of the stage before, what stands before
    the first block is a layer of its own (BEiT's rule, arXiv 2106.08254, appendix).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    blocks = sorted({block for path in flat if (block := _block(path)) is not None})

    def depth(path: str) -> int:
        block = _block(path)
        if block is not None:
            return len(blocks) - blocks.index(block)
        if path.split("/")[0] in ("head", "head_dist", "norm"):
            return 0
        entrance = _ENTRANCE.match(path)
        # pools_0 stands before PiT's stage 1, patch_embed1 before PVT's stage 1
        stage = 0 if entrance is None else int(entrance[1] or int(entrance[2]) + 1)
        return len(blocks) + 1 - sum(block[0] < stage for block in blocks)

    return traverse_util.unflatten_dict({path: depth(path) for path in flat}, sep="/")


def _block(path: str) -> tuple[int, int] | None:
    match = _BLOCK.match(path)
    numbers = [int(group) for group in match.groups() if group is not None] if match else []
    return (*[0] * (2 - len(numbers)), *numbers) if numbers else None


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
