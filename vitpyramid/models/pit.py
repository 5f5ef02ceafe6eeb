"""Pooling-based Vision Transformer (PiT).

Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", ICCV 2021, arXiv 2103.16302. Equal to `pit.py` of
github.com/naver-ai/pit, commit 9d97a62e, which takes only images whose grid of patches is the position table's. Here
the table is resized for any other grid, bicubically as PyTorch does it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.attention import Block
from vitpyramid.models.layers import (
    at_least_float32,
    linear,
    normal_init,
    resize_positions,
    shard_batch,
    torch_bias_init,
    torch_kernel_init,
)
from vitpyramid.models.pyramid import Level, Variant
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
            name="conv",
        )(x)


class PoolConv(nn.Module):
    """Grouped 3 x 3 convolution of stride 2, padded by 1 on all sides; each input channel makes `features / C` outputs.

    Computed as nine shifted products, which is the same sum: XLA on CPU takes seconds for the gradient of a grouped
    convolution with several outputs a group, a hundred times as long. Parameters are those of the convolution:
    `kernel [3, 3, 1, features]`, `bias [features]`, initialised as PyTorch does.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / 2), ceil(w / 2), features]`."""
        b, height, width, dim = x.shape
        h, w = -(-height // 2), -(-width // 2)
        kernel = self.param("kernel", torch_kernel_init, (3, 3, 1, self.features))
        bias = self.param("bias", torch_bias_init(9), (self.features,))
        # The sum of nine products is kept in at least float32, as a convolution keeps it.
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=at_least_float32(self.dtype))
        kernel = kernel.reshape(3, 3, dim, -1)  # output channels are group-major
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[..., None]
        out = bias.reshape(dim, -1)
        for i in range(3):
            for j in range(3):
                out = out + x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] * kernel[i, j]
        return out.reshape(b, h, w, self.features).astype(self.dtype)


class Pool(nn.Module):
    """Pooling layer (paper section 3): halves the map, widens map and class tokens."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, class_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, h, w, C], [B, T, C]` -> `[B, ceil(h / 2), ceil(w / 2), dim], [B, T, dim]`."""
        fc = linear(self.dim, self.dtype, "fc", torch_init_from=class_tokens.shape[-1])
        return PoolConv(self.dim, self.dtype, name="conv")(x), fc(class_tokens)


class Stage(nn.Module):
    """Transformer blocks over class tokens and map together.

    Attributes:
      drop_paths: of each block.
    """

    heads: int
    mlp_ratio: float
    drop_rate: float
    attn_drop_rate: float
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
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "epsilon": 1e-6,
            "qkv_bias": True,
            "drop_rate": self.drop_rate,
            "attn_drop_rate": self.attn_drop_rate,
            "torch_init": True,
            "dtype": self.dtype,
        }
        tokens = apply_blocks(Block, fields, shard_batch(tokens), self.drop_paths, "blocks", self.remat, self.scan)
        return tokens[:, extra:].reshape(shape), tokens[:, :extra]


class PiT(nn.Module):
    """Three stages of transformer blocks, each on half the grid of the one before; class tokens go through all.

    Attributes:
      depths, dims, heads: per stage, Table 1 of the paper.
      patch, stride: of the patch embedding; patches overlap where `stride < patch`.
      distilled: a second class token with a head of its own, for distillation.
      num_classes: size of the heads.
      image_size: input size (side, or height and width) whose grid the position table has. Any other size can be given
        at call time; the table is then resized.
      drop_rate: dropout after positions, projections and in the MLP.
      attn_drop_rate: dropout on attention maps.
      drop_path_rate: stochastic depth; block i of n drops at `drop_path_rate * i / n`, counted over all stages from 0.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: compile one block a stage and loop over it (`stack.apply_blocks`); needs `remat`.
      dtype: of activations and matrix products; norms' statistics, softmax and logits are at least float32.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    heads: tuple[int, ...]
    patch: int = 16
    stride: int = 8
    mlp_ratio: float = 4.0
    distilled: bool = False
    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    # Besides vectors, which no family decays.
    no_weight_decay = ("pos_embed", "cls_token")

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each stage's map."""
        return tuple(self.stride * 2**s for s in range(len(self.depths)))

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

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits `[B, num_classes]` of normalised images `[B, H, W, 3]`, both sides at least `patch`.

        `train=True` turns dropout and drop path on, which then need a `dropout` RNG if their rates are not zero. A
        distilled network then returns `(class_logits, distill_logits)`, otherwise their mean.
        """
        _, class_tokens = self.encode(images, train)
        class_tokens = self.norm(class_tokens)
        class_logits = self.head(class_tokens[:, 0])
        if not self.distilled:
            return class_logits
        distill_logits = self.head_dist(class_tokens[:, 1])
        return (class_logits, distill_logits) if train else (class_logits + distill_logits) / 2

    def features(self, images: jax.Array, train: bool = False) -> tuple[Level, ...]:
        """Map of each stage's last block, before pooling and without norm; sides are halved upwards (27, 14, 7)."""
        return self.encode(images, train)[0]

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The pyramid and the class tokens `[B, 1 or 2, C]` of the last stage."""
        if images.ndim != 4 or min(images.shape[1:3]) < self.patch:
            raise ValueError(
                f"images have shape {images.shape}, expected [B, H, W, C] with H and W at least {self.patch}"
            )
        size = self.image_size
        native = tuple(
            (side - self.patch) // self.stride + 1 for side in ((size, size) if isinstance(size, int) else size)
        )
        drop_rate, attn_drop_rate = (self.drop_rate, self.attn_drop_rate) if train else (0.0, 0.0)
        total = sum(self.depths)
        drop_paths = [self.drop_path_rate * i / total if train else 0.0 for i in range(total)]

        x = PatchEmbed(self.dims[0], self.patch, self.stride, self.dtype, name="patch_embed")(images)
        b, *grid, dim = x.shape
        table = self.param("pos_embed", normal_init, (1, *native, dim)).reshape(1, -1, dim)
        positions = resize_positions(table, native, tuple(grid), "bicubic").reshape(1, *grid, dim)
        x = nn.Dropout(drop_rate, deterministic=False)(x + positions.astype(self.dtype))
        # Class tokens have no position.
        class_tokens = self.param("cls_token", normal_init, (1, 1 + self.distilled, dim))
        class_tokens = jnp.broadcast_to(class_tokens, (b, *class_tokens.shape[1:])).astype(self.dtype)

        levels = []
        for s, depth in enumerate(self.depths):
            if s > 0:
                x, class_tokens = Pool(self.dims[s], self.dtype, name=f"pools_{s - 1}")(x, class_tokens)
            first = sum(self.depths[:s])
            x, class_tokens = Stage(
                self.heads[s],
                self.mlp_ratio,
                drop_rate,
                attn_drop_rate,
                tuple(drop_paths[first : first + depth]),
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
