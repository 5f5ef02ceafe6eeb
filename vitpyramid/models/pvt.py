"""Pyramid Vision Transformer (v1).

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", ICCV 2021,
arXiv 2102.12122. Equal to `classification/pvt.py` of github.com/whai362/PVT, commit 57e2dfaa, except in one place: the
official code leaves a position table as it is wherever a stage has as many tokens as stage 1 at 224 x 224 (3136), which
is the wrong table at 112 x 448 and a crash at 448 x 448. Here every table is resized on its own stage's grid.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.attention import attend
from vitpyramid.models.layers import (
    DropPath,
    Mlp,
    PatchConv,
    at_least_float32,
    layer_norm,
    linear,
    normal_init,
    resize_positions,
    shard_batch,
)
from vitpyramid.models.pyramid import Level, Variant
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
        return layer_norm(1e-5, self.dtype, "norm")(x)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a map reduced `sr_ratio` times in each direction (section 3.3)."""

    heads: int
    sr_ratio: int
    grid: tuple[int, int]
    drop_rate: float
    attn_drop_rate: float
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
            source = layer_norm(1e-5, self.dtype, "norm")(source.reshape(b, -1, dim))
        key_value = linear(2 * dim, self.dtype, "kv")(source).reshape(b, -1, 2, self.heads, dim // self.heads)
        x = attend(
            self, query, key_value[:, :, 0], key_value[:, :, 1], (dim // self.heads) ** -0.5, self.attn_drop_rate
        )
        return nn.Dropout(self.drop_rate, deterministic=False)(linear(dim, self.dtype, "proj")(x))


class Block(nn.Module):
    """Pre-norm transformer encoder layer."""

    heads: int
    mlp_ratio: int
    sr_ratio: int
    grid: tuple[int, int]
    drop_rate: float
    attn_drop_rate: float
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        attn = SpatialReductionAttention(
            self.heads, self.sr_ratio, self.grid, self.drop_rate, self.attn_drop_rate, self.dtype, name="attn"
        )
        mlp = Mlp(x.shape[-1] * self.mlp_ratio, self.drop_rate, dtype=self.dtype, name="mlp")
        x = x + DropPath(self.drop_path)(attn(layer_norm(1e-6, self.dtype, "norm1")(x)))
        return x + DropPath(self.drop_path)(mlp(layer_norm(1e-6, self.dtype, "norm2")(x)))


class PVT(nn.Module):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32; a class token in the last.

    Attributes:
      depths, dims, heads, mlp_ratios, sr_ratios: per stage, Table 1 of the paper (depths as in the code and weights).
      num_classes: size of the head.
      image_size: input size (side, or height and width) whose grids the position tables have. Any other size can be
        given at call time; the tables are then resized bilinearly.
      drop_rate: dropout after positions, projections and in the MLP.
      attn_drop_rate: dropout on attention maps.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: compile one block a stage and loop over it (`stack.apply_blocks`); needs `remat`.
      dtype: of activations and matrix products; norms' statistics, softmax and logits are at least float32.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    # Besides vectors, which no family decays. The position tables are decayed.
    no_weight_decay = ("cls_token",)
    strides = (4, 8, 16, 32)

    def setup(self):
        self.norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False)
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype), kernel_init=normal_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` of normalised images `[B, H, W, 3]`, both sides at least 32.

        `train=True` turns dropout and drop path on, which then need a `dropout` RNG if their rates are not zero.
        """
        _, class_token = self.encode(images, train)
        return self.head(self.norm(class_token))

    def features(self, images: jax.Array, train: bool = False) -> tuple[Level, ...]:
        """Output of each stage's last block, without norm; strides 4, 8, 16, 32, sides floored."""
        return self.encode(images, train)[0]

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The pyramid and the class token `[B, C]`."""
        if images.ndim != 4 or min(images.shape[1:3]) < 32:
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, C] with H and W at least 32")
        size = self.image_size
        native = (size, size) if isinstance(size, int) else tuple(size)
        drop_rate, attn_drop_rate = (self.drop_rate, self.attn_drop_rate) if train else (0.0, 0.0)
        drop_paths = iter(np.linspace(0, self.drop_path_rate if train else 0.0, sum(self.depths)).tolist())

        levels = []
        x = images
        for s, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True), start=1):
            patch = 4 if s == 1 else 2
            native = (native[0] // patch, native[1] // patch)
            x = PatchEmbed(dim, patch, self.dtype, name=f"patch_embed{s}")(x)
            b, *grid, _ = x.shape
            grid = tuple(grid)
            x = x.reshape(b, -1, dim)  # [B, h * w, C]
            has_class_token = s == len(self.depths)
            slots = native[0] * native[1] + has_class_token
            table = self.param(f"pos_embed{s}", normal_init, (1, slots, dim))
            positions = resize_positions(table[:, has_class_token:], native, grid, "bilinear")
            if has_class_token:
                class_token = self.param("cls_token", normal_init, (1, 1, dim))
                class_token = jnp.broadcast_to(class_token, (b, 1, dim)).astype(self.dtype)
                x = jnp.concatenate([class_token, x], axis=1)  # [B, 1 + h * w, C]
                positions = jnp.concatenate([table[:, :1], positions], axis=1)
            x = x + positions.astype(self.dtype)
            x = shard_batch(nn.Dropout(drop_rate, deterministic=False)(x))
            fields = {
                "heads": self.heads[s - 1],
                "mlp_ratio": self.mlp_ratios[s - 1],
                "sr_ratio": self.sr_ratios[s - 1],
                "grid": grid,
                "drop_rate": drop_rate,
                "attn_drop_rate": attn_drop_rate,
                "dtype": self.dtype,
            }
            rates = list(itertools.islice(drop_paths, depth))
            x = apply_blocks(Block, fields, x, rates, f"block{s}", self.remat, self.scan)
            class_token = x[:, 0]
            x = x[:, has_class_token:].reshape(b, *grid, dim)
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
