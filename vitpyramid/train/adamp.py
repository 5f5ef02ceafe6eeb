"""AdamP: Adam whose step does not grow the norm of weights that a following norm makes scale-invariant.

Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", ICLR 2021, arXiv
2006.08217; as PiT was trained with it: `timm/optim/adamp.py` of timm 0.3.4 with `nesterov=True`, `wd_ratio=0.01`,
`delta=0.1`. Later versions do not add epsilon to each of a cosine's norms but bound their product by it from below,
which differs only for gradients of about epsilon.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from vitpyramid.models.backbone import Stage
from vitpyramid.models.stack import is_stacked

DELTA = 0.1
DECAY_RATIO = 0.01


def scale_by_adamp(
    beta1: float, beta2: float, eps: float, weight_decay: float, decayed: Callable, stages: Sequence[Stage] = ()
) -> optax.GradientTransformation:
    """Directions that `optax.scale_by_learning_rate` turns into AdamP's steps, decoupled weight decay included.

    Where the gradient of a parameter of two or more dimensions is nearly orthogonal to it, row by row or as a whole,
    the component along the parameter is taken out of the step and the weight decay divided by 100. Rows are PyTorch's
    first axis, so a kernel's last one here. Blocks stacked by `scan` count one by one.

    Args:
      weight_decay: as PyTorch's, to be multiplied by the learning rate.
      decayed: from parameters to a tree of bools.
      stages: of the model.
    """

    def init(params) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(beta1, beta2, eps).init(params)

    def update(grads, state: optax.ScaleByAdamState, params):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)

        def direction(path, param, grad, m, v, decays):
            root = jnp.sqrt(v) / jnp.sqrt(1 - beta2 ** count.astype(v.dtype)) + eps
            step = (beta1 * m + (1 - beta1) * grad) / root
            last = path[-1].key == "kernel"
            if is_stacked(jax.tree_util.keystr(path, simple=True, separator="/"), stages):
                step, ratio = jax.vmap(lambda *arrays: _project(*arrays, last, eps))(param, grad, step)
                ratio = ratio.reshape(-1, *[1] * (param.ndim - 1))
            else:
                step, ratio = _project(param, grad, step, last, eps)
            step = step / (1 - beta1 ** count.astype(step.dtype))
            return step + weight_decay * ratio * param if decays and weight_decay else step

        updates = jax.tree_util.tree_map_with_path(direction, params, grads, mu, nu, decayed(params))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _project(param: jax.Array, grad: jax.Array, step: jax.Array, rows_last: bool, eps: float):
    """The step without what lies along the parameter, if the gradient is orthogonal; and the factor of the decay."""
    if param.ndim < 2:
        return step, jnp.ones((), step.dtype)
    axis = param.ndim - 1 if rows_last else 0
    views = (tuple(a for a in range(param.ndim) if a != axis), tuple(range(param.ndim)))
    result, ratio, undecided = step, jnp.ones((), step.dtype), jnp.array(True)
    for along in views:  # row by row, then as a whole
        length = math.prod(param.shape[a] for a in along)
        norm = jnp.sqrt(jnp.sum(param * param, axis=along, keepdims=True))
        grad_norm = jnp.sqrt(jnp.sum(grad * grad, axis=along, keepdims=True))
        cosine = jnp.abs(jnp.sum(grad * param, axis=along, keepdims=True)) / (norm + eps) / (grad_norm + eps)
        orthogonal = undecided & (cosine.max() < DELTA / math.sqrt(length))
        unit = param / (norm + eps)
        projected = step - unit * jnp.sum(unit * step, axis=along, keepdims=True)
        result = jnp.where(orthogonal, projected, result)
        ratio = jnp.where(orthogonal, DECAY_RATIO, ratio)
        undecided = undecided & ~orthogonal
    return result, ratio
