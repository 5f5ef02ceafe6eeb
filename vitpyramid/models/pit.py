"""Pooling-based Vision Transformer (PiT).

Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", ICCV 2021, arXiv 2103.16302. Equal to `pit.py` of
github.com/naver-ai/pit, commit 9d97a62e, which takes only images whose grid of patches is the position table's. Here
the table is resized for any other grid, bicubically as PyTorch does it.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models import forms
from vitpyramid.models.attention import Block, SelfAttention
from vitpyramid.models.backbone import DistilledBackbone, Level, PositionTable, Stage, Variant
from vitpyramid.models.layers import (
    Mlp,
    at_least_float32,
    linear,
    normal_init,
    resize_positions,
    torch_bias_init,
    torch_kernel_init,
)
from vitpyramid.models.sharding import shard_batch
from vitpyramid.models.stack import apply_blocks


class PatchEmbed(nn.Module):
    """Embeds overlapping patches by a convolution without padding. No norm follows."""

    dim: int
    patch: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, (H - patch) // stride + 1, (W - patch) // stride + 1, dim]`."""
        return nn.Conv(
            self.dim,
            (self.patch, self.patch),
            (self.stride, self.stride),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(self.patch**2 * x.shape[-1]),
            conv_general_dilated=forms.patch_embedding,
            name="conv",
        )(x)


class PoolConv(nn.Module):
    """Grouped 3 x 3 convolution of stride 2, padded by 1 on all sides; each input channel makes `features / C` outputs.

    Parameters are those of the convolution: `kernel [3, 3, 1, features]`, `bias [features]`, initialised as PyTorch
    does.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / 2), ceil(w / 2), features]`."""
        kernel = self.param("kernel", torch_kernel_init, (3, 3, 1, self.features))
        bias = self.param("bias", torch_bias_init(9), (self.features,))
        return forms.widening_convolution(x, kernel, bias, self.dtype)

    @nn.nowrap
    def elementwise_macs(self, out: jax.Array) -> int:
        """Multiply-accumulates of the convolution, for `tools.summary`, which cannot see them in shifted products."""
        return 9 * out.size


class Pool(nn.Module):
    """Pooling layer (paper section 3): halves the map, widens map and class tokens."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, class_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, h, w, C], [B, T, C]` -> `[B, ceil(h / 2), ceil(w / 2), dim], [B, T, dim]`."""
        fc = linear(self.dim, self.dtype, "fc", torch_init_from=class_tokens.shape[-1])
        return PoolConv(self.dim, self.dtype, name="conv")(x), fc(class_tokens)


class Transformer(nn.Module):
    """The blocks of a stage, over class tokens and map together.

    Attributes:
      drop_paths: of each block.
    """

    heads: int
    mlp_ratio: float
    drop_rate: float
    drop_paths: tuple[float, ...]
    remat: bool
    scan: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, class_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, h, w, C], [B, T, C]` -> the same shapes."""
        shape, extra = x.shape, class_tokens.shape[1]
        tokens = jnp.concatenate([class_tokens, x.reshape(shape[0], -1, shape[-1])], axis=1)  # [B, T + h * w, C]
        fields = {
            "attention": functools.partial(
                SelfAttention,
                self.heads,
                qkv_bias=True,
                drop_rate=self.drop_rate,
                torch_init=True,
                dtype=self.dtype,
            ),
            "mlp": functools.partial(Mlp, self.mlp_ratio, self.drop_rate, torch_init=True, dtype=self.dtype),
            "epsilon": 1e-6,
            "dtype": self.dtype,
        }
        tokens = apply_blocks(Block, fields, shard_batch(tokens), self.drop_paths, "blocks", self.remat, self.scan)
        return tokens[:, extra:].reshape(shape), tokens[:, :extra]


class PiT(DistilledBackbone):
    """Three stages of transformer blocks, each on half the grid of the one before; class tokens go through all.

    Maps are those before pooling; sides are halved upwards (27, 14, 7).

    Attributes:
      depths, dims, heads: per stage, Table 1 of the paper.
      patch, stride: of the patch embedding; patches overlap where `stride < patch`.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 16
    stride: int = 8
    mlp_ratio: float = 4.0

    signature = "patch_embed/conv/kernel"
    no_weight_decay = ("pos_embed", "cls_token")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Pools stand between them."""
        entrances = [("patch_embed", "pos_embed", "cls_token"), *((f"pools_{s}",) for s in range(len(self.depths) - 1))]
        return tuple(
            Stage(before, tuple(f"transformers_{s}/blocks_{j}" for j in range(depth)))
            for s, (before, depth) in enumerate(zip(entrances, self.depths, strict=True))
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Doubled by each pool."""
        return tuple(self.stride * 2**s for s in range(len(self.depths)))

    @property
    def least_side(self) -> int:
        """A patch."""
        return self.patch

    @property
    def position_tables(self) -> tuple[PositionTable, ...]:
        """One; class tokens have no position."""
        height, width = ((side - self.patch) // self.stride + 1 for side in self.height_width)
        return (PositionTable("params/pos_embed", (height, width)),)

    @nn.nowrap
    def image_side(self, grid_side: int) -> int:
        """Patches overlap."""
        return (grid_side - 1) * self.stride + self.patch

    @nn.nowrap
    def drop_paths(self, train: bool) -> list[float]:
        """Block i of n drops at `drop_path_rate * i / n`, counted over all stages from 0."""
        total = sum(self.depths)
        return [self.drop_path_rate * i / total if train else 0.0 for i in range(total)]

    def setup(self):
        self.norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False)
        head = functools.partial(
            nn.Dense,
            self.num_classes,
            dtype=at_least_float32(self.dtype),
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(self.dims[-1]),
        )
        self.head = head()
        if self.distilled:
            self.head_dist = head()

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The pyramid and the class tokens `[B, 1 or 2, C]` of the last stage."""
        self.check_images(images)
        drop_rate = self.drop_rate if train else 0.0
        drop_paths = iter(self.drop_paths(train))

        x = PatchEmbed(self.dims[0], self.patch, self.stride, self.dtype, name="patch_embed")(images)
        b, *grid, dim = x.shape
        (native,) = self.position_tables
        table = self.param("pos_embed", normal_init, (1, *native.grid, dim)).reshape(1, -1, dim)
        positions = resize_positions(table, native.grid, tuple(grid), self.resize_method).reshape(1, *grid, dim)
        x = nn.Dropout(drop_rate, deterministic=False)(x + positions.astype(self.dtype))
        # Class tokens have no position.
        class_tokens = self.param("cls_token", normal_init, (1, 1 + self.distilled, dim))
        class_tokens = jnp.broadcast_to(class_tokens, (b, *class_tokens.shape[1:])).astype(self.dtype)

        levels = []
        for s, depth in enumerate(self.depths):
            if s > 0:
                x, class_tokens = Pool(self.dims[s], self.dtype, name=f"pools_{s - 1}")(x, class_tokens)
            x, class_tokens = Transformer(
                self.heads[s],
                self.mlp_ratio,
                drop_rate,
                tuple(itertools.islice(drop_paths, depth)),
                self.remat,
                self.scan,
                self.dtype,
                name=f"transformers_{s}",
            )(x, class_tokens)
            levels.append(Level(x, self.strides[s]))
        return tuple(levels), class_tokens


_TI = PiT((2, 6, 4), dims=(64, 128, 256), heads=(2, 4, 8))
_XS = PiT((2, 6, 4), dims=(96, 192, 384), heads=(2, 4, 8))
_S = PiT((2, 6, 4), dims=(144, 288, 576), heads=(3, 6, 12))
_B = PiT((3, 6, 4), dims=(256, 512, 1024), heads=(4, 8, 16), patch=14, stride=7)

VARIANTS = {
    "pit_ti": Variant(_TI, params=4_847_272, gmacs=0.71, top1=73.0),
    "pit_xs": Variant(_XS, params=10_618_888, gmacs=1.4, top1=78.1),
    "pit_s": Variant(_S, params=23_461_912, gmacs=2.9, top1=80.9),
    "pit_b": Variant(_B, params=73_764_840, gmacs=12.5, top1=82.0),
    "pit_ti_distilled": Variant(_TI.clone(distilled=True), params=5_104_336, gmacs=0.71, top1=74.6),
    "pit_xs_distilled": Variant(_XS.clone(distilled=True), params=11_003_984, gmacs=1.4, top1=79.1),
    "pit_s_distilled": Variant(_S.clone(distilled=True), params=24_039_056, gmacs=2.9, top1=81.9),
    "pit_b_distilled": Variant(_B.clone(distilled=True), params=74_790_096, gmacs=12.5, top1=84.0),
    # Not from the paper: for small images and small machines.
    "pit_micro": Variant(
        PiT((1, 1, 1), (64, 128, 256), (2, 4, 8), patch=8, stride=4, num_classes=10, image_size=32), params=1_101_834
    ),
}
