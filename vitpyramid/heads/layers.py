"""What the heads have in common: convolutions."""

import flax.linen as nn
import jax

from vitpyramid.models.initialisers import gaussian

# Of RetinaNet's and RPN's convolutions.
SMALL = gaussian(0.01)


def convolution(
    features: int,
    kernel: int,
    dtype,
    name: str | None = None,
    *,
    stride: int = 1,
    init=SMALL,
    bias: float | None = 0.0,
) -> nn.Conv:
    """Square convolution, with a bias unless that is None, padded by `(kernel - 1) // 2` on every side.

    Padding is explicit because SAME puts none above and left of an even side at stride 2.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        padding=(kernel - 1) // 2,
        use_bias=bias is not None,
        dtype=dtype,
        kernel_init=init,
        bias_init=nn.initializers.constant(bias or 0.0),
        name=name,
    )


def per_anchor(x: jax.Array, numbers: int) -> jax.Array:
    """`[B, h, w, A * numbers]` -> `[B, h * w * A, numbers]`."""
    return x.reshape(x.shape[0], -1, numbers)


def one_per_anchor(x: jax.Array) -> jax.Array:
    """`[B, h, w, A]` -> `[B, h * w * A]`."""
    rows = x.reshape(*x.shape[:2], -1)
    # In one step this took a TPU's compiler half a minute for a map of 200 x 336.
    rows = jax.lax.platform_dependent(rows, tpu=jax.lax.optimization_barrier, default=lambda rows: rows)
    return rows.reshape(x.shape[0], -1)
