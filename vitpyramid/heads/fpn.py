"""Feature pyramid network: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.

Equal to mmdetection's `FPN`, which resizes to the size of the finer map, odd or not, and to detectron2's.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.heads.layers import convolution
from vitpyramid.models.backbone import Level
from vitpyramid.models.initialisers import xavier_uniform


class FPN(nn.Module):
    """Every level gets the coarser ones' sum, enlarged, and a 3 x 3 convolution; coarser levels are added.

    Attributes:
      channels: width of every output.
      extra: coarser levels than the backbone's, each with twice the stride.
      pool: they take every second pixel of the level before (Mask R-CNN); otherwise the first is a convolution of the
        backbone's last map itself, the next one of it (RetinaNet).
      relu_between: a ReLU before the convolution of every extra level but the first (detectron2).
      kernel_init: of all convolutions.
    """

    channels: int = 256
    extra: int = 0
    pool: bool = False
    relu_between: bool = False
    kernel_init: Callable = xavier_uniform
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[Level]) -> tuple[Level, ...]:
        """Levels `[B, h, w, C]`, finest first -> as many and `extra` of `[B, h, w, channels]`."""

        def conv(x: jax.Array, kernel: int, name: str, stride: int = 1) -> jax.Array:
            return convolution(self.channels, kernel, self.dtype, name, stride=stride, init=self.kernel_init)(x)

        sums = [conv(level.x, 1, f"lateral_convs_{i}") for i, level in enumerate(levels)]
        for i in reversed(range(1, len(sums))):
            sums[i - 1] += enlarge(sums[i], sums[i - 1].shape[1:3])
        outs = [
            Level(conv(x, 3, f"fpn_convs_{i}"), level.stride)
            for i, (x, level) in enumerate(zip(sums, levels, strict=True))
        ]
        source = levels[-1].x
        for i in range(self.extra):
            if self.pool:
                x = outs[-1].x[:, ::2, ::2]
            else:
                x = nn.relu(source) if self.relu_between and i else source
                x = source = conv(x, 3, f"fpn_convs_{len(outs)}", stride=2)
            outs.append(Level(x, 2 * outs[-1].stride))
        return tuple(outs)


def enlarge(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """`[B, h, w, C]` -> `[B, *grid, C]`: every output pixel is the input's at its place, rounded down."""
    for axis, size in enumerate(grid, start=1):
        if size % x.shape[axis] == 0:
            x = jnp.repeat(x, size // x.shape[axis], axis=axis)
        else:
            x = jnp.take(x, np.arange(size) * x.shape[axis] // size, axis=axis)
    return x
