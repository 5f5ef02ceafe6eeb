"""The optimizer of a config."""

import jax
import optax
from ml_collections import ConfigDict


def decay_mask(params, no_weight_decay: tuple[str, ...]):
    """True for each parameter that is decayed: not vectors (biases, norms), not those named in `no_weight_decay`.

    timm's `add_weight_decay` rule, as PVT, PiT, T2T-ViT and ResT were trained with.
    """

    # By name: in stacked blocks vectors have a second axis.
    exempt = {"bias", "scale", *no_weight_decay}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in exempt, params)


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
