"""Data-efficient image transformer (DeiT): the plain Vision Transformer, and its distilled form.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021, arXiv
2012.12877; Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929. Equal to `models.py` of
github.com/facebookresearch/deit on the `VisionTransformer` of timm 0.3.2, which take only images of the size the model
was built for. Here the position table is resized for any other grid, bicubically, as the official fine-tuning script
does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.attention import Block
from vitpyramid.models.layers import PatchConv, at_least_float32, normal_init, resize_positions, shard_batch
from vitpyramid.models.pyramid import Level, Variant
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


class ViT(nn.Module):
    """Transformer blocks over a class token, if distilled a distillation token, and the patches of an image.

    Attributes:
      dim, heads, depth: width of a token, attention heads and blocks, Table 1 of the DeiT paper.
      patch: side of a patch.
      distilled: a second token with a head of its own, for distillation (DeiT paper, section 4).
      num_classes: size of the heads.
      image_size: input size (side, or height and width) whose grid the position table has. Any other size can be given
        at call time; the table is then resized.
      drop_rate: dropout after positions, projections and in the MLP.
      attn_drop_rate: dropout on attention maps.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over the blocks.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: compile one block and loop over it (`stack.apply_blocks`); needs `remat`.
      dtype: of activations and matrix products; norms' statistics, softmax and logits are at least float32.
    """

    dim: int
    heads: int
    depth: int = 12
    patch: int = 16
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
    no_weight_decay = ("pos_embed", "cls_token", "dist_token")

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of the one map there is."""
        return (self.patch,)

    def setup(self):
        self.norm = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False)
        dtype = at_least_float32(self.dtype)
        self.head = nn.Dense(self.num_classes, dtype=dtype, kernel_init=normal_init)
        if self.distilled:
            self.head_dist = nn.Dense(self.num_classes, dtype=dtype, kernel_init=normal_init)

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
        """Patch tokens of the last block as one map, without norm; stride `patch`, sides floored."""
        return self.encode(images, train)[0]

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The map and the tokens that the heads read, `[B, 1 or 2, C]`."""
        if images.ndim != 4 or min(images.shape[1:3]) < self.patch:
            raise ValueError(
                f"images have shape {images.shape}, expected [B, H, W, C] with H and W at least {self.patch}"
            )
        size = self.image_size
        native = tuple(side // self.patch for side in ((size, size) if isinstance(size, int) else size))
        drop_rate, attn_drop_rate = (self.drop_rate, self.attn_drop_rate) if train else (0.0, 0.0)
        drop_paths = np.linspace(0, self.drop_path_rate if train else 0.0, self.depth).tolist()

        x = PatchEmbed(self.dim, self.patch, self.dtype, name="patch_embed")(images)
        b, *grid, dim = x.shape
        class_tokens = [self.param("cls_token", normal_init, (1, 1, dim))]
        if self.distilled:
            class_tokens.append(self.param("dist_token", normal_init, (1, 1, dim)))
        extra = len(class_tokens)
        class_tokens = [jnp.broadcast_to(token, (b, 1, dim)).astype(self.dtype) for token in class_tokens]
        x = jnp.concatenate([*class_tokens, x.reshape(b, -1, dim)], axis=1)  # [B, T + h * w, C]
        table = self.param("pos_embed", normal_init, (1, extra + native[0] * native[1], dim))
        positions = resize_positions(table[:, extra:], native, tuple(grid), "bicubic")
        positions = jnp.concatenate([table[:, :extra], positions], axis=1)
        x = x + positions.astype(self.dtype)
        x = shard_batch(nn.Dropout(drop_rate, deterministic=False)(x))
        fields = {
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "epsilon": 1e-6,
            "qkv_bias": True,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "dtype": self.dtype,
        }
        x = apply_blocks(Block, fields, x, drop_paths, "blocks", self.remat, self.scan)
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
