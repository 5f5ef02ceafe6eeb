"""RegNetY: the convolutional network that DeiT and PiT learn from by distillation.

Radosavovic et al., "Designing Network Design Spaces", CVPR 2020, arXiv 2003.13678. Equal in evaluation to timm's
`regnety_160`, whose weights (RegNetY-16GF) DeiT's authors name as the teacher.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.backbone import Backbone, Level, Stage, Variant
from vitpyramid.models.layers import BatchNorm, at_least_float32, normal_init
from vitpyramid.models.sharding import shard_batch


class ConvNorm(nn.Module):
    """Convolution without bias, padded as PyTorch pads, batch norm, and ReLU unless `act` is False."""

    dim: int
    kernel: int
    stride: int
    groups: int
    act: bool
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), dim]`."""
        window, pad = (self.kernel, self.kernel), self.kernel // 2
        x = nn.Conv(
            self.dim,
            window,
            self.stride,
            ((pad, pad), (pad, pad)),
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )(x)
        x = BatchNorm(self.train, self.dtype, name="bn")(x)
        return nn.relu(x) if self.act else x


class SqueezeExcitation(nn.Module):
    """Scales each channel by a function of all channels' means."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> the same."""
        pooled = x.astype(at_least_float32(self.dtype)).mean((1, 2), keepdims=True).astype(self.dtype)
        pooled = nn.relu(nn.Conv(self.hidden, (1, 1), dtype=self.dtype, name="fc1")(pooled))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name="fc2")(pooled))


class Bottleneck(nn.Module):
    """`1x1 -> grouped 3x3 -> squeeze-excitation -> 1x1`, added to the input.

    Where the output has another width or stride than the input, the input goes through a 1x1 convolution first.
    """

    dim: int
    stride: int
    group_width: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), dim]`."""
        rest = {"train": self.train, "dtype": self.dtype}
        width, shortcut = x.shape[-1], x
        if width != self.dim or self.stride > 1:
            shortcut = ConvNorm(self.dim, 1, self.stride, 1, act=False, name="downsample", **rest)(x)
        x = ConvNorm(self.dim, 1, 1, 1, act=True, name="conv1", **rest)(x)
        x = ConvNorm(self.dim, 3, self.stride, self.dim // self.group_width, act=True, name="conv2", **rest)(x)
        x = SqueezeExcitation(round(width / 4), self.dtype, name="se")(x)
        x = ConvNorm(self.dim, 1, 1, 1, act=False, name="conv3", **rest)(x)
        return nn.relu(x + shortcut)


class Head(nn.Module):
    """Mean over the map, then `fc`."""

    num_classes: int
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, K]`, in at least float32."""
        wide = at_least_float32(self.dtype)
        x = nn.Dropout(self.drop_rate, deterministic=not train)(x.astype(wide).mean((1, 2)))
        return nn.Dense(self.num_classes, dtype=wide, kernel_init=normal_init, name="fc")(x)


class RegNetY(Backbone):
    """A convolutional stem and four stages of bottlenecks, at strides 4, 8, 16 and 32. Grids are rounded up.

    `drop_rate` is of dropout before the head. There is no drop path, and a stage's first block differs from the others:
    `drop_path_rate` and `scan` other than 0 and False are a `ValueError`.

    Attributes:
      depths, dims: blocks and width of each stage.
      group_width: channels of a group in the 3x3 convolutions; divides every width.
      stem_dim: width of the stem, at stride 2.
      freeze_statistics: batch norm keeps to its running statistics in training.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    group_width: int
    stem_dim: int = 32
    freeze_statistics: bool = False

    signature = "s1/b1/conv1/conv/kernel"
    strides = (4, 8, 16, 32)
    after = ("head",)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The first block of each is also its downsampling."""
        return tuple(
            Stage(("stem",) if s == 1 else (), tuple(f"s{s}/b{j}" for j in range(1, depth + 1)))
            for s, depth in enumerate(self.depths, start=1)
        )

    def setup(self):
        self.head = Head(self.num_classes, self.drop_rate, self.dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """As `Backbone`."""
        return self.head(self.encode(images, train)[1], train)

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The pyramid and its last map."""
        self.check_images(images)
        if self.scan or self.drop_path_rate:
            raise ValueError(
                f"scan={self.scan}, drop_path_rate={self.drop_path_rate}: expected False and 0, RegNetY has neither"
            )
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        of_batch = train and not self.freeze_statistics
        x = ConvNorm(self.stem_dim, 3, 2, 1, True, of_batch, self.dtype, name="stem")(images.astype(self.dtype))
        levels = []
        for s, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True), start=1):
            x = Bottlenecks(block, depth, dim, self.group_width, of_batch, self.dtype, name=f"s{s}")(x)
            levels.append(Level(x, self.strides[s - 1]))
        return tuple(levels), x


class Bottlenecks(nn.Module):
    """Blocks of one width; the first halves the map."""

    block: type[nn.Module]
    depth: int
    dim: int
    group_width: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / 2), ceil(w / 2), dim]`."""
        for j in range(1, self.depth + 1):
            stride = 2 if j == 1 else 1
            block = self.block(self.dim, stride, self.group_width, self.train, self.dtype, name=f"b{j}")
            x = shard_batch(block(x))
        return x


VARIANTS = {
    # RegNetY-16GF.
    "regnety_160": Variant(RegNetY((2, 4, 11, 1), (224, 448, 1232, 3024), 112), params=83_590_140),
    # Not from the paper: for small images and small machines.
    "regnety_micro": Variant(
        RegNetY((1, 1, 3, 1), (32, 64, 128, 256), 16, stem_dim=16, num_classes=10, image_size=32), params=393_014
    ),
}
