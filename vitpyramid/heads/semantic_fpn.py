"""Semantic FPN: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.

Equal to mmsegmentation's (0.13) `FPNHead` on its `FPN`, with which PVT's segmentation was trained.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.heads import losses
from vitpyramid.heads.fpn import FPN
from vitpyramid.heads.layers import convolution
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.models.backbone import Level
from vitpyramid.models.initialisers import fan_out_normal
from vitpyramid.models.layers import BatchNorm, at_least_float32, resize

IGNORED = 255  # label of pixels that are not learned from


class ConvNorm(nn.Module):
    """Convolution 3 x 3 without a bias, batch norm, ReLU."""

    features: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, features]`."""
        x = convolution(self.features, 3, self.dtype, "conv", init=fan_out_normal, bias=None)(x)
        return nn.relu(BatchNorm(self.train, self.dtype, name="bn")(x))


class FPNHead(nn.Module):
    """Every level is brought to the size of the finest by convolutions and doublings; the sum is classified."""

    num_classes: int
    channels: int
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels: Sequence[Level], train: bool) -> jax.Array:
        """Maps `[B, h, w, C]`, finest first -> logits `[B, h, w, K]` on the finest's grid, at least float32."""
        finest, total = levels[0], 0
        for i, level in enumerate(levels):
            doublings = round(math.log2(level.stride / finest.stride))
            x = level.x
            for j in range(max(doublings, 1)):
                # Numbered as in the original, where a doubling without weights stands behind each convolution.
                x = ConvNorm(self.channels, train, self.dtype, name=f"scale_heads_{i}_{2 * j}")(x)
                if doublings:
                    x = resize(x, (2 * x.shape[1], 2 * x.shape[2]))
            total += resize(x, finest.x.shape[1:3])
        # Whole channels are dropped.
        total = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2), deterministic=not train)(total)
        logits = convolution(self.num_classes, 1, self.dtype, "conv_seg")(total)
        return logits.astype(at_least_float32(self.dtype))


class SemanticFPN(DenseNetwork, kw_only=True):
    """A class of every pixel, on the grid of the finest level.

    Attributes:
      channels, head_channels: of the pyramid and of the head.
      head_drop_rate: of whole channels before the classification.
      library: whose names the weights have in PyTorch.
    """

    num_classes: int = 150
    channels: int = 256
    head_channels: int = 128
    head_drop_rate: float = 0.1
    library: str = "mmsegmentation"

    after = ("neck", "decode_head")
    class_layer = "decode_head/conv_seg"

    def setup(self):
        self.neck = FPN(self.channels, dtype=self.dtype)
        self.decode_head = FPNHead(self.num_classes, self.head_channels, self.head_drop_rate, self.dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[B, h, w, num_classes]`, at least float32; `train=True` needs `batch_stats` to be mutable."""
        return self.decode_head(self.pyramid(images, train), train)

    def losses(self, images: jax.Array, labels: jax.Array, train: bool = True) -> dict[str, jax.Array]:
        """Cross-entropy of every pixel, `[]`; see `pixel_loss`.

        Args:
          labels: int `[B, H, W]`, of the canvas: classes from 0, `IGNORED` where there is none.
        """
        return {"loss_seg": pixel_loss(self(images, train), labels)}


def pixel_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over all pixels; ignored ones are 0 and count (mmsegmentation's `cross_entropy`).

    Args:
      logits: `[B, h, w, K]`; they are enlarged to the labels' size.
      labels: int `[B, H, W]`, `IGNORED` where there is none.
    """
    logits = resize(logits, labels.shape[1:3])
    there = labels != IGNORED
    return jnp.where(there, losses.cross_entropy(logits, jnp.where(there, labels, 0)), 0).mean()


def probabilities(logits: jax.Array, canvas: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """Probabilities `[B, H, W, K]` of images as they were before they were resized.

    Args:
      logits: `[B, h, w, K]`.
      canvas: height and width of what the network saw: logits are resized to it first, as in mmsegmentation.
      size: of the images.
    """
    return jax.nn.softmax(resize(resize(logits, canvas), size), axis=-1)
