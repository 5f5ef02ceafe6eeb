"""Pyramid Vision Transformer (v1).

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", ICCV 2021,
arXiv 2102.12122. Equal to `classification/pvt.py` of github.com/whai362/PVT, commit 57e2dfaa, except in one place: the
official code leaves a position table as it is wherever a stage has as many tokens as stage 1 at 224 x 224 (3136), which
is the wrong table at 112 x 448 and a crash at 448 x 448. Here every table is resized on its own stage's grid.
"""

import functools
import itertools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.attention import Block, attend, output_dropout
from vitpyramid.models.backbone import Backbone, Level, PositionTable, Stage, Variant
from vitpyramid.models.layers import (
    LayerNorm,
    Mlp,
    PackedLinear,
    PatchConv,
    at_least_float32,
    linear,
    normal_init,
    resize_positions,
)
from vitpyramid.models.sharding import shard_batch
from vitpyramid.models.stack import apply_blocks


class PatchEmbed(nn.Module):
    """Splits a map into patches and embeds each (paper section 3.2)."""

    dim: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H // patch, W // patch, dim]`."""
        x = PatchConv(self.dim, self.patch, self.dtype, name="proj")(x)
        return LayerNorm(1e-5, self.dtype, name="norm")(x)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a map reduced `sr_ratio` times in each direction (section 3.3)."""

    heads: int
    sr_ratio: int
    grid: tuple[int, int]
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`; with `sr_ratio > 1` the tokens are exactly the grid, row-major."""
        b, n, dim = x.shape
        query = linear(dim, self.dtype, "q")(x).reshape(b, n, self.heads, -1)
        source = x
        if self.sr_ratio > 1:
            source = x.reshape(b, *self.grid, dim)
            source = PatchConv(dim, self.sr_ratio, self.dtype, name="sr")(source)
            source = LayerNorm(1e-5, self.dtype, name="norm")(source.reshape(b, -1, dim))
        key, value = PackedLinear(2, self.heads, self.dtype, name="kv")(source)
        x = attend(self, query, key, value)
        return output_dropout(self.drop_rate)(linear(dim, self.dtype, "proj")(x))


class PVT(Backbone):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32; a class token in the last. Grids are floored.

    Attributes:
      depths, dims, heads, mlp_ratios, sr_ratios: per stage, Table 1 of the paper (depths as in the code and weights).
      class_token: whether there is one, in the fourth stage. Without it there are no logits; the position table keeps
        its row.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    class_token: bool = True

    signature = "pos_embed1"
    strides = (4, 8, 16, 32)
    least_side = 32
    no_weight_decay = ("cls_token",)  # the position tables are decayed
    resize_method = "bilinear"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The class token stands before the last."""
        entrances = [(f"patch_embed{s}", f"pos_embed{s}") for s in range(1, len(self.depths) + 1)]
        entrances[-1] += ("cls_token",) if self.class_token else ()
        return tuple(
            Stage(before, tuple(f"block{s}_{j}" for j in range(depth)))
            for s, (before, depth) in enumerate(zip(entrances, self.depths, strict=True), start=1)
        )

    @property
    def position_tables(self) -> tuple[PositionTable, ...]:
        """One a stage; the fourth has a row for the class token."""
        height, width = self.height_width
        strides = self.strides[: len(self.depths)]
        return tuple(
            PositionTable(f"params/pos_embed{s}", (height // stride, width // stride), extra=int(s == 4))
            for s, stride in enumerate(strides, start=1)
        )

    @nn.nowrap
    def dense(self, levels: Sequence[int]) -> "PVT":
        """Without a class token (`detection/pvt.py`, `segmentation/pvt.py`), and without stages that are not read."""
        per_stage = ("depths", "dims", "heads", "mlp_ratios", "sr_ratios")
        read = {name: getattr(self, name)[: max(levels) + 1] for name in per_stage}
        return self.clone(class_token=False, **read)

    def setup(self):
        self.norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False)
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype), kernel_init=normal_init)

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array | None]:
        """The pyramid and the class token `[B, C]`."""
        self.check_images(images)
        drop_rate = self.drop_rate if train else 0.0
        drop_paths = iter(self.drop_paths(train))

        levels, class_token = [], None
        x = images
        for s, (depth, dim, native) in enumerate(zip(self.depths, self.dims, self.position_tables, strict=True), 1):
            patch = 4 if s == 1 else 2
            x = PatchEmbed(dim, patch, self.dtype, name=f"patch_embed{s}")(x)
            b, *grid, _ = x.shape
            grid = tuple(grid)
            x = x.reshape(b, -1, dim)  # [B, h * w, C]
            slots = native.extra + native.grid[0] * native.grid[1]
            table = self.param(f"pos_embed{s}", normal_init, (1, slots, dim))
            positions = resize_positions(table[:, native.extra :], native.grid, grid, self.resize_method)
            has_token = self.class_token and s == len(self.depths)
            if has_token:
                class_token = self.param("cls_token", normal_init, (1, 1, dim))
                class_token = jnp.broadcast_to(class_token, (b, 1, dim)).astype(self.dtype)
                x = jnp.concatenate([class_token, x], axis=1)  # [B, 1 + h * w, C]
                positions = jnp.concatenate([table[:, :1], positions], axis=1)
            x = x + positions.astype(self.dtype)
            x = shard_batch(nn.Dropout(drop_rate, deterministic=False)(x))
            heads, mlp_ratio, sr_ratio = self.heads[s - 1], self.mlp_ratios[s - 1], self.sr_ratios[s - 1]
            fields = {
                "attention": functools.partial(SpatialReductionAttention, heads, sr_ratio, grid, drop_rate, self.dtype),
                "mlp": functools.partial(Mlp, mlp_ratio, drop_rate, dtype=self.dtype),
                "epsilon": 1e-6,
                "dtype": self.dtype,
            }
            rates = list(itertools.islice(drop_paths, depth))
            x = apply_blocks(Block, fields, x, rates, f"block{s}", self.remat, self.scan)
            if has_token:
                class_token, x = x[:, 0], x[:, 1:]
            x = x.reshape(b, *grid, dim)
            levels.append(Level(x, self.strides[s - 1]))
        return tuple(levels), class_token


VARIANTS = {
    "pvt_tiny": Variant(PVT((2, 2, 2, 2)), params=13_229_288, gmacs=1.9, top1=75.1),
    "pvt_small": Variant(PVT((3, 4, 6, 3)), params=24_485_864, gmacs=3.8, top1=79.8),
    "pvt_medium": Variant(PVT((3, 4, 18, 3)), params=44_208_104, gmacs=6.7, top1=81.2),
    "pvt_large": Variant(PVT((3, 8, 27, 3)), params=61_369_320, gmacs=9.8, top1=81.7),
    # Not from the paper: for small images and small machines.
    "pvt_micro": Variant(
        PVT((1, 1, 1, 1), (32, 64, 128, 256), (1, 2, 4, 8), (4, 4, 4, 4), (4, 2, 1, 1), num_classes=10, image_size=32),
        params=1_266_218,
    ),
}
