"""The optimizer of a config."""

import jax
import optax
from ml_collections import ConfigDict


def decay_mask(params, no_weight_decay: tuple[str, ...]):
    """True for each parameter that is decayed: not vectors (biases, norms), not those named in `no_weight_decay`.

    timm's `add_weight_decay` rule, as PVT, PiT, T2T-ViT and ResT were trained with.
    """

    def decayed(path, value):
        return value.ndim > 1 and path[-1].key not in no_weight_decay

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, no_weight_decay: tuple[str, ...]
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by global norm if the config asks for it."""
    optim = config.optim
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, lambda params: decay_mask(params, no_weight_decay)),
        optax.scale_by_learning_rate(schedule),
    )
