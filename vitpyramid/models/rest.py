"""ResT (v1): efficient attention over maps that convolutions embed and shrink.

Zhang and Yang, "ResT: An Efficient Transformer for Visual Recognition", NeurIPS 2021, arXiv 2105.13677. Equal to
`models/rest.py` of github.com/wofmanaf/ResT, commit b9245d3f, at the sizes where that runs: both sides are more than 32
and between `32 k - 3` and `32 k`. Elsewhere every grid is what the convolutions give: a side halved is rounded up.

Two things are as the formulas say where the official code has no answer. A stage with one query and one key (a side of
32 or less): the softmax is 1, and instance norm makes it 0, as it does in the official code for several queries and one
key; the attention branch then adds nothing but the bias of `proj`. Training where a channel has one value in the whole
batch, so that it has no variance: `ValueError`, as in PyTorch.
"""

import functools
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models import forms, rest_forms
from vitpyramid.models.attention import Block, attend, output_dropout
from vitpyramid.models.backbone import Backbone, Level, Stage, Variant
from vitpyramid.models.layers import (
    BatchNorm,
    LayerNorm,
    Mlp,
    PackedLinear,
    at_least_float32,
    batch_norm_variables,
    linear,
    normal_init,
    torch_bias_init,
    update_running,
)
from vitpyramid.models.sharding import shard_batch
from vitpyramid.models.stack import apply_blocks


class DepthwiseConv(nn.Module):
    """Depthwise convolution, padded by half its odd `side`: of stride 1 and side 3, or of an even stride `side - 1`.

    Parameters are those of the convolution: `kernel [side, side, 1, C]`, `bias [C]`.
    """

    side: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), C]`."""
        c = x.shape[-1]
        kernel = self.param("kernel", normal_init, (self.side, self.side, 1, c))
        bias = self.param("bias", torch_bias_init(self.side**2), (c,))
        form = forms.depthwise_convolution if self.stride == 1 else forms.reducing_convolution
        return form(x, kernel, bias, self.dtype)

    @nn.nowrap
    def elementwise_macs(self, out: jax.Array) -> int:
        """Multiply-accumulates of the convolution, for `tools.summary`, which cannot see them here."""
        return self.side**2 * out.size


class PixelAttention(nn.Module):
    """Position encoding: every pixel is gated by its neighbourhood in its own channel (paper section 3.4)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> the same."""
        return x * nn.sigmoid(DepthwiseConv(3, 1, self.dtype, name="pa_conv")(x))


class StemConv(nn.Module):
    """The kernel of a convolution of the stem."""

    features: int

    @nn.compact
    def __call__(self, c: int) -> jax.Array:
        """`[3, 3, c, features]`."""
        return self.param("kernel", normal_init, (3, 3, c, self.features))


class StemNorm(nn.Module):
    """The variables of a `BatchNorm` whose sums belong to the stem's."""

    dim: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array, nn.Variable, nn.Variable]:
        """Scale, shift, running mean and running variance, `[dim]` each."""
        return batch_norm_variables(self, self.dim)


class Stem(nn.Module):
    """Three convolutions, of which two halve the map; batch norm and ReLU behind the first two."""

    dim: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` -> `[B, ceil(H / 4), ceil(W / 4), dim]`."""
        b, height, width, c = x.shape
        half, values = self.dim // 2, b * -(-height // 2) * -(-width // 2)
        if self.train and values < 2:
            raise ValueError(f"the stem got {x.shape} in training, expected more than one value in each channel's norm")
        kernels = (
            StemConv(half, name="conv1")(c),
            StemConv(half, name="conv2")(half),
            StemConv(self.dim, name="conv3")(half),
        )
        norms = [StemNorm(half, name=name)() for name in ("norm1", "norm2")]
        arrays = tuple((scale, bias, mean.value, var.value) for scale, bias, mean, var in norms)
        x, moments = rest_forms.stem(x, kernels, arrays, self.train, self.dtype)
        if self.train and not self.is_initializing():
            for (_, _, mean, var), (of_mean, of_var) in zip(norms, moments, strict=True):
                update_running(mean, var, of_mean, of_var, values)
        return PixelAttention(self.dtype, name="pos")(x)


class PatchEmbed(nn.Module):
    """Halves a map between stages: overlapping patches."""

    dim: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / 2), ceil(w / 2), dim]`."""
        x = nn.Conv(
            self.dim,
            (3, 3),
            2,
            padding=1,  # SAME puts none above and left of an even side
            dtype=self.dtype,
            kernel_init=normal_init,
            bias_init=torch_bias_init(9 * x.shape[-1]),
            name="conv",
        )(x)
        x = BatchNorm(self.train, self.dtype, name="norm")(x)
        return PixelAttention(self.dtype, name="pos")(x)


class HeadMixing(nn.Module):
    """The parameters of a 1 x 1 convolution across heads: every head's logits become a sum over all heads'."""

    heads: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Kernel `[heads, heads]` and bias `[heads]`."""
        kernel = self.param("kernel", normal_init, (1, 1, self.heads, self.heads))
        return kernel[0, 0], self.param("bias", torch_bias_init(self.heads), (self.heads,))


class EfficientAttention(nn.Module):
    """Attention to a reduced map, with heads mixed before the softmax and normalised after it (section 3.2)."""

    heads: int
    sr_ratio: int
    grid: tuple[int, int]
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`; the tokens are exactly the grid, row-major."""
        b, n, dim = x.shape
        query = linear(dim, self.dtype, "q")(x).reshape(b, n, self.heads, -1)
        source = x
        if self.sr_ratio > 1:
            source = x.reshape(b, *self.grid, dim)
            source = DepthwiseConv(self.sr_ratio + 1, self.sr_ratio, self.dtype, name="sr")(source)
            source = LayerNorm(1e-5, self.dtype, name="sr_norm")(source.reshape(b, -1, dim))
        key, value = PackedLinear(2, self.heads, self.dtype, name="kv")(source)
        attention = functools.partial(attend, self) if self.heads == 1 else self.attend_mixed
        x = attention(query, key, value)
        return output_dropout(self.drop_rate)(linear(dim, self.dtype, "proj")(x))

    def attend_mixed(self, query, key, value) -> jax.Array:
        """`attend` with `transform_conv` before the softmax and instance norm after it, which leaves rows of sum 0."""
        arrays = query, key, value, *HeadMixing(self.heads, name="transform_conv")()
        if self.is_mutable_collection("intermediates"):
            weights = rest_forms.mixed_softmax(query, key, *arrays[3:])
            self.sow("intermediates", "softmax", weights)
            self.sow("intermediates", "attention", rest_forms.instance_norm(weights))
        out = rest_forms.mixed_attention(*arrays)
        return out.reshape(*out.shape[:2], -1)


class ResT(Backbone):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32; no class token, no position tables.

    Positions come from convolutions, so no weight depends on the size of images. Grids are rounded up.

    Attributes:
      depths, dims: number of blocks and width of tokens, per stage.
      heads, mlp_ratios, sr_ratios: of the blocks, per stage. Stages of one head have plain softmax attention.
      freeze_statistics: batch norm keeps to its running statistics in training.
      normed: stages, 0 the first, whose output is normed before it is a level and before the next stage takes it.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 256, 512)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    freeze_statistics: bool = False
    normed: tuple[int, ...] = ()

    signature = "patch_embedding_2/conv/kernel"
    strides = (4, 8, 16, 32)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Each behind its embedding."""
        entrances = [("stem",), *((f"patch_embedding_{s}",) for s in range(2, len(self.depths) + 1))]
        for s in set(self.normed) - {len(self.depths) - 1}:
            entrances[s + 1] = (f"norm{s + 1}", *entrances[s + 1])
        return tuple(
            Stage(before, tuple(f"stage{s}_{j}" for j in range(depth)))
            for s, (before, depth) in enumerate(zip(entrances, self.depths, strict=True), start=1)
        )

    @nn.nowrap
    def dense(self, levels: Sequence[int]) -> "ResT":
        """A norm behind every stage that is read, which the next stage takes as well (`d2/rest.py`).

        It is another function of the image than the classifier, and another one for other levels.
        """
        return self.clone(normed=tuple(levels))

    def setup(self):
        self.norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False)
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype), kernel_init=normal_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """As `Backbone`: the head reads the mean over the last map."""
        tokens = self.norm(self.encode(images, train)[1])
        return self.head(tokens.mean((1, 2), dtype=at_least_float32(self.dtype)))

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The pyramid and its last map."""
        self.check_images(images)
        drop_rate = self.drop_rate if train else 0.0
        drop_paths = iter(self.drop_paths(train))
        of_batch = train and not self.freeze_statistics

        levels = []
        x = images
        for s, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True), start=1):
            if s == 1:
                x = Stem(dim, of_batch, self.dtype, name="stem")(x)
            else:
                x = PatchEmbed(dim, of_batch, self.dtype, name=f"patch_embedding_{s}")(x)
            b, *grid, _ = x.shape
            grid = tuple(grid)
            x = shard_batch(x.reshape(b, -1, dim))  # [B, h * w, C]
            heads, mlp_ratio, sr_ratio = self.heads[s - 1], self.mlp_ratios[s - 1], self.sr_ratios[s - 1]
            fields = {
                "attention": functools.partial(EfficientAttention, heads, sr_ratio, grid, drop_rate, self.dtype),
                "mlp": functools.partial(Mlp, mlp_ratio, drop_rate, dtype=self.dtype),
                "epsilon": 1e-5,
                "dtype": self.dtype,
            }
            rates = list(itertools.islice(drop_paths, depth))
            x = apply_blocks(Block, fields, x, rates, f"stage{s}", self.remat, self.scan)
            x = x.reshape(b, *grid, dim)
            if s - 1 in self.normed:
                x = self.norm(x) if s == len(self.depths) else LayerNorm(1e-5, self.dtype, name=f"norm{s}")(x)
            levels.append(Level(x, self.strides[s - 1]))
        return tuple(levels), x


WIDE = (96, 192, 384, 768)
VARIANTS = {
    "rest_lite": Variant(ResT((2, 2, 2, 2)), params=10_508_300, gmacs=1.4, top1=77.2),
    "rest_small": Variant(ResT((2, 2, 6, 2)), params=13_679_708, gmacs=1.9, top1=79.6),
    "rest_base": Variant(ResT((2, 2, 6, 2), WIDE), params=30_327_052, gmacs=4.3, top1=81.6),
    "rest_large": Variant(ResT((2, 2, 18, 2), WIDE), params=51_676_156, gmacs=7.9, top1=83.6),
    # Not from the paper: for small images and small machines.
    "rest_micro": Variant(
        ResT((1, 1, 1, 1), (32, 64, 128, 256), sr_ratios=(4, 2, 1, 1), num_classes=10, image_size=32),
        params=1_456_188,
    ),
}
