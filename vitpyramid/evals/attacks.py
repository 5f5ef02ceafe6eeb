"""Attacks that see the network's gradient, within `eps` of every pixel: FGSM and PGD.

Images are pixels `[B, H, W, 3]` in `[0, 1]`, and stay there; `eps` is in the same units: 4 / 255 moves each of the 256
levels by up to 4. The loss does whatever comes between pixels and network, normalisation included, so that `eps` means
the same for every network. It is the sum over the batch: each image is attacked by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Loss = Callable[[jax.Array], jax.Array]


def fgsm(loss: Loss, images: jax.Array, eps: float) -> jax.Array:
    """One step of `eps` along the gradient's sign (Goodfellow et al., arXiv 1412.6572)."""
    return jnp.clip(images + eps * jnp.sign(jax.grad(loss)(images)), 0, 1)


def pgd(loss: Loss, images: jax.Array, eps: float, step: float, steps: int, keys: jax.Array | None = None) -> jax.Array:
    """Steps along the gradient's sign, each brought back to within `eps` (Madry et al., arXiv 1706.06083).

    Args:
      step: length of a step.
      keys: of the start, one an image, `[B]`: it is then drawn evenly from within `eps`. None: the images themselves.
    """
    start = images
    if keys is not None:
        draw = jax.vmap(lambda key, image: jax.random.uniform(key, image.shape, image.dtype, -eps, eps))
        start = jnp.clip(images + draw(keys, images), 0, 1)

    def move(_, attacked):
        attacked = attacked + step * jnp.sign(jax.grad(loss)(attacked))
        return jnp.clip(jnp.clip(attacked, images - eps, images + eps), 0, 1)

    return jax.lax.fori_loop(0, steps, move, start)
