"""Data-efficient image transformer (DeiT): the plain Vision Transformer, and its distilled form.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021, arXiv
2012.12877; Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929. Equal to `models.py` of
github.com/facebookresearch/deit on the `VisionTransformer` of timm 0.3.2, which take only images of the size the model
was built for. Here the position table is resized for any other grid, bicubically, as the official fine-tuning script
does.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.attention import Block, SelfAttention
from vitpyramid.models.backbone import DistilledBackbone, Level, PositionTable, Stage, Variant
from vitpyramid.models.layers import Mlp, PatchConv, at_least_float32, normal_init, resize_positions
from vitpyramid.models.sharding import shard_batch
from vitpyramid.models.stack import apply_blocks


class PatchEmbed(nn.Module):
    """Splits the image into patches and embeds each. No norm follows."""

    dim: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H // patch, W // patch, dim]`."""
        return PatchConv(self.dim, self.patch, self.dtype, name="proj")(x)


class ViT(DistilledBackbone):
    """Transformer blocks over a class token, if distilled a distillation token, and the patches of an image.

    The one map is of the patch tokens; sides are floored.

    Attributes:
      dim, heads, depth: width of a token, attention heads and blocks, Table 1 of the DeiT paper.
      patch: side of a patch.
    """

    dim: int
    heads: int
    depth: int = 12
    patch: int = 16
    mlp_ratio: float = 4.0

    signature = "patch_embed/proj/kernel"
    no_weight_decay = ("pos_embed", "cls_token")  # the distillation token is decayed, as officially

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        before = ("patch_embed", "cls_token", *["dist_token"] * self.distilled, "pos_embed")
        return (Stage(before, tuple(f"blocks_{j}" for j in range(self.depth))),)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the one map there is."""
        return (self.patch,)

    @property
    def level_dims(self) -> tuple[int, ...]:
        """Of the one map there is."""
        return (self.dim,)

    @property
    def least_side(self) -> int:
        """A patch."""
        return self.patch

    @property
    def position_tables(self) -> tuple[PositionTable, ...]:
        """One, with rows for the class tokens."""
        height, width = (side // self.patch for side in self.height_width)
        return (PositionTable("params/pos_embed", (height, width), extra=1 + self.distilled),)

    def setup(self):
        self.norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False)
        dtype = at_least_float32(self.dtype)
        self.head = nn.Dense(self.num_classes, dtype=dtype, kernel_init=normal_init)
        if self.distilled:
            self.head_dist = nn.Dense(self.num_classes, dtype=dtype, kernel_init=normal_init)

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The map and the class tokens `[B, 1 or 2, C]`."""
        self.check_images(images)
        drop_rate = self.drop_rate if train else 0.0

        x = PatchEmbed(self.dim, self.patch, self.dtype, name="patch_embed")(images)
        b, *grid, dim = x.shape
        class_tokens = [self.param("cls_token", normal_init, (1, 1, dim))]
        if self.distilled:
            class_tokens.append(self.param("dist_token", normal_init, (1, 1, dim)))
        class_tokens = [jnp.broadcast_to(token, (b, 1, dim)).astype(self.dtype) for token in class_tokens]
        x = jnp.concatenate([*class_tokens, x.reshape(b, -1, dim)], axis=1)  # [B, T + h * w, C]
        (native,) = self.position_tables
        extra = native.extra
        table = self.param("pos_embed", normal_init, (1, extra + native.grid[0] * native.grid[1], dim))
        positions = resize_positions(table[:, extra:], native.grid, tuple(grid), self.resize_method)
        positions = jnp.concatenate([table[:, :extra], positions], axis=1)
        x = x + positions.astype(self.dtype)
        x = shard_batch(nn.Dropout(drop_rate, deterministic=False)(x))
        fields = {
            "attention": functools.partial(
                SelfAttention, self.heads, qkv_bias=True, drop_rate=drop_rate, dtype=self.dtype
            ),
            "mlp": functools.partial(Mlp, self.mlp_ratio, drop_rate, dtype=self.dtype),
            "epsilon": 1e-6,
            "dtype": self.dtype,
        }
        x = apply_blocks(Block, fields, x, self.drop_paths(train), "blocks", self.remat, self.scan)
        return (Level(x[:, extra:].reshape(b, *grid, dim), self.patch),), x[:, :extra]


_TINY, _SMALL, _BASE = ViT(192, heads=3), ViT(384, heads=6), ViT(768, heads=12)

VARIANTS = {
    "deit_tiny": Variant(_TINY, params=5_717_416, gmacs=1.3, top1=72.2),
    "deit_small": Variant(_SMALL, params=22_050_664, gmacs=4.6, top1=79.9),
    "deit_base": Variant(_BASE, params=86_567_656, gmacs=17.6, top1=81.8),
    "deit_tiny_distilled": Variant(_TINY.clone(distilled=True), params=5_910_800, gmacs=1.3, top1=74.5),
    "deit_small_distilled": Variant(_SMALL.clone(distilled=True), params=22_436_432, gmacs=4.6, top1=81.2),
    "deit_base_distilled": Variant(_BASE.clone(distilled=True), params=87_338_192, gmacs=17.6, top1=83.4),
    # Not from the paper: for small images and small machines.
    "deit_micro": Variant(ViT(192, heads=3, depth=3, patch=4, num_classes=10, image_size=32), params=1_358_986),
}
