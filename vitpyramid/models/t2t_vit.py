"""Tokens-to-Token Vision Transformer.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021, arXiv 2101.11986.
Equal to `models/` of github.com/yitu-opensource/T2T-ViT, commit 0f63dc95, where that runs: on square images, and at
other sizes than `image_size` with the position table that its constructor would make for them. It is the network that
the official functions build without `pretrained=True`, which sets a `qk_scale` that the published weights were not
trained with.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.attention import Block, attend
from vitpyramid.models.layers import (
    DropPath,
    Mlp,
    at_least_float32,
    layer_norm,
    linear,
    normal_init,
    shard_batch,
    torch_bias_init,
)
from vitpyramid.models.pyramid import Level, Variant
from vitpyramid.models.stack import apply_blocks
from vitpyramid.models.t2t_module import TokensToToken, token_grid


def sinusoid(tokens: int, dim: int) -> np.ndarray:
    """Fixed position table `[1, tokens, dim]`, float32 of a float64 computation: sines and cosines by turns."""
    channel = np.arange(dim)
    angle = np.arange(tokens)[:, None] / 10000.0 ** (2 * (channel // 2) / dim)
    return np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))[None].astype(np.float32)


class SqueezeExcitation(nn.Module):
    """Gates each channel by a function of all channels' means over tokens."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        dim = x.shape[-1]
        gate = nn.relu(linear(dim // 16, self.dtype, "fc_0", use_bias=False)(jnp.mean(x, axis=1, keepdims=True)))
        return x * nn.sigmoid(linear(dim, self.dtype, "fc_2", use_bias=False)(gate))


class SEAttention(nn.Module):
    """Self-attention with squeeze-and-excitation behind the projection."""

    heads: int
    qkv_bias: bool
    scale: float
    drop_rate: float
    attn_drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        b, n, dim = x.shape
        qkv = linear(3 * dim, self.dtype, "qkv", self.qkv_bias)(x)
        query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, -1), 2, 0)
        x = attend(self, query, key, value, self.scale, self.attn_drop_rate)
        x = SqueezeExcitation(self.dtype, name="se_layer")(linear(dim, self.dtype, "proj")(x))
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


class SEBlock(Block):
    """Transformer block with squeeze-and-excitation on the attention branch (paper section 3.2)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        dim = x.shape[-1]
        scale = (dim // self.heads) ** -0.5 if self.scale is None else self.scale
        attn = SEAttention(
            self.heads, self.qkv_bias, scale, self.drop_rate, self.attn_drop_rate, self.dtype, name="attn"
        )
        mlp = Mlp(int(dim * self.mlp_ratio), self.drop_rate, dtype=self.dtype, name="mlp")
        x = x + DropPath(self.drop_path)(attn(layer_norm(self.epsilon, self.dtype, "norm1")(x)))
        return x + DropPath(self.drop_path)(mlp(layer_norm(self.epsilon, self.dtype, "norm2")(x)))


class CheapOperation(nn.Module):
    """One factor a channel: a depthwise convolution of width 1, stored and initialised (in [-1, 1]) as PyTorch does."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        return x * self.param("kernel", torch_bias_init(1), (1, 1, x.shape[-1])).astype(self.dtype)


class GhostAttention(nn.Module):
    """Self-attention whose query, key and value are computed by half; the other half is a multiple of the first."""

    heads: int
    qkv_bias: bool
    scale: float
    drop_rate: float
    attn_drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        b, n, dim = x.shape
        packed = []
        for name in ("q", "k", "v"):
            half = linear(dim // 2, self.dtype, name, self.qkv_bias)(x)
            ghost = CheapOperation(self.dtype, name=f"cheap_operation_{name}")(half)
            packed.append(jnp.concatenate([half, ghost], axis=-1).reshape(b, n, self.heads, -1))
        x = attend(self, *packed, self.scale, self.attn_drop_rate)
        x = linear(dim, self.dtype, "proj")(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


class GhostMlp(nn.Module):
    """MLP whose hidden layer is computed by a third, `[B, N, C]`; the others are GELUs of multiples of the first."""

    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        dim = x.shape[-1]
        gelu = functools.partial(nn.gelu, approximate=False)
        x = gelu(linear(dim, self.dtype, "fc1")(x))
        ghosts = [gelu(CheapOperation(self.dtype, name=f"cheap_operation{i}")(x)) for i in (2, 3)]
        x = jnp.concatenate([x, *ghosts], axis=-1)  # [B, N, 3 * C]
        x = nn.Dropout(self.drop_rate, deterministic=False)(x)
        x = linear(dim, self.dtype, "fc2")(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


class GhostBlock(Block):
    """Transformer block with ghost attention and ghost MLP (paper section 3.2). `mlp_ratio` is not used: it is 3."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        scale = (x.shape[-1] // self.heads) ** -0.5 if self.scale is None else self.scale
        attn = GhostAttention(
            self.heads, self.qkv_bias, scale, self.drop_rate, self.attn_drop_rate, self.dtype, name="attn"
        )
        mlp = GhostMlp(self.drop_rate, self.dtype, name="mlp")
        x = x + DropPath(self.drop_path)(attn(layer_norm(self.epsilon, self.dtype, "norm1")(x)))
        return x + DropPath(self.drop_path)(mlp(layer_norm(self.epsilon, self.dtype, "norm2")(x)))


class DenseBlock(Block):
    """Transformer block with a dense connection: appends `growth` channels to its input (paper section 3.2)."""

    growth: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C + growth]`."""
        new = linear(self.growth, self.dtype, "dense_linear")(super().__call__(x))
        return jnp.concatenate([x, new], axis=-1)


class Transition(nn.Module):
    """Halves the width between groups of dense blocks."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C // 2]`."""
        return nn.gelu(linear(x.shape[-1] // 2, self.dtype, "linear")(x), approximate=False)


class T2TViT(nn.Module):
    """Tokens-to-token module and a deep, narrow backbone of transformer blocks at stride 16.

    Attributes:
      embed_dim, depth, heads, mlp_ratio: of the backbone, Table 1 of the paper (depth as in the code and weights).
      tokens_type: kind of the tokens-to-token module: "performer", "transformer" or "convolution".
      block: class of the backbone's blocks.
      qk_scale: of the attention logits of the backbone; None: `d ** -0.5` for heads of width `d`, as the published
        weights were trained.
      num_classes: size of the head.
      image_size: input size (side, or height and width) whose number of tokens the stored position table has. Any other
        size can be given at call time; a sinusoid is then made for it.
      token_drop_rate: dropout of the performer. It is 0.1 in the official code whatever the other rates are.
      drop_rate: dropout after positions, projections and in the MLP of the backbone.
      attn_drop_rate: dropout on attention maps of the backbone.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.
      remat: recompute each block and attention layer in the backward pass instead of storing what is inside it.
      scan: compile one block and loop over it (`stack.apply_blocks`); needs `remat`. Not for dense blocks.
      dtype: of activations and matrix products; norms' statistics, softmax, the performer's features and logits are at
        least float32.
    """

    embed_dim: int
    depth: int
    heads: int
    mlp_ratio: float
    tokens_type: str = "performer"
    block: type[Block] = Block
    qk_scale: float | None = None
    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    token_drop_rate: float = 0.1
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    # Besides vectors, which no family decays.
    no_weight_decay = ("cls_token",)
    strides = (16,)

    def setup(self):
        self.norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False)
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype), kernel_init=normal_init)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]` of normalised images `[B, H, W, 3]`, both sides at least 3.

        `train=True` turns dropout and drop path on, which then need a `dropout` RNG if their rates are not zero.
        """
        tokens, _ = self.encode(images, train)
        return self.head(self.norm(tokens[:, 0]))

    def features(self, images: jax.Array, train: bool = False) -> tuple[Level, ...]:
        """Patch tokens of the last block as one map, without norm; stride 16, sides `token_grid(H, W)`."""
        tokens, grid = self.encode(images, train)
        x = tokens[:, 1:].reshape(tokens.shape[0], *grid, -1)
        return (Level(x, self.strides[0]),)

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[jax.Array, tuple[int, int]]:
        """Tokens after the last block `[B, 1 + h * w, C]`, the class token first; the grid `(h, w)`."""
        if images.ndim != 4 or min(images.shape[1:3]) < 3:
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, C] with H and W at least 3")
        names = ("token_drop_rate", "drop_rate", "attn_drop_rate", "drop_path_rate")
        token_drop, drop, attn_drop, drop_path = (getattr(self, name) if train else 0.0 for name in names)
        x = TokensToToken(self.embed_dim, self.tokens_type, token_drop, self.remat, self.dtype, name="tokens_to_token")(
            images
        )
        b, *grid, dim = x.shape
        x = x.reshape(b, -1, dim)  # [B, h * w, C]
        class_token = self.param("cls_token", normal_init, (1, 1, dim))
        class_token = jnp.broadcast_to(class_token, (b, 1, dim)).astype(self.dtype)
        x = jnp.concatenate([class_token, x], axis=1)  # [B, 1 + h * w, C]
        x = x + self.positions(x.shape[1], dim).astype(self.dtype)
        x = shard_batch(nn.Dropout(drop, deterministic=False)(x))
        fields = {
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            "epsilon": 1e-5,
            "qkv_bias": False,
            "scale": self.qk_scale,
            "drop_rate": drop,
            "attn_drop_rate": attn_drop,
            "dtype": self.dtype,
        }
        return self.backbone(x, fields, np.linspace(0, drop_path, self.depth).tolist()), tuple(grid)

    def positions(self, tokens: int, dim: int) -> jax.Array:
        """Sinusoid `[1, tokens, dim]`: the stored one, which is not trained, if it has as many tokens."""
        size = self.image_size
        height, width = token_grid(*((size, size) if isinstance(size, int) else size))
        stored = self.variable("constants", "pos_embed", lambda: jnp.asarray(sinusoid(1 + height * width, dim))).value
        return stored if stored.shape[1] == tokens else jnp.asarray(sinusoid(tokens, dim))

    def backbone(self, x: jax.Array, fields: dict, drop_paths: list[float]) -> jax.Array:
        """The blocks one after another, `[B, N, C]` -> `[B, N, C]`; `fields` are those that all blocks share."""
        return apply_blocks(self.block, fields, x, drop_paths, "blocks", self.remat, self.scan)


class T2TViTDense(T2TViT):
    """T2T-ViT with dense connections: each block widens its input, a transition between groups halves the width.

    Attributes:
      groups: blocks in each group.
      growth: channels that a block appends.
      depth: not a number of blocks but the length of the drop path schedule, of which group `g` takes entry `g`: so
        it is in the official code.
    """

    block: type[Block] = DenseBlock
    groups: tuple[int, ...] = (3, 6, 6, 4)
    growth: int = 64

    def backbone(self, x: jax.Array, fields: dict, drop_paths: list[float]) -> jax.Array:
        """Groups of blocks with transitions between them, `[B, N, C]` -> `[B, N, C']`; numbered as one list."""
        if self.scan:
            raise ValueError("scan=True: expected False, dense blocks differ in shape and cannot be one loop")
        block = nn.remat(self.block) if self.remat else self.block
        names = (f"blocks_{i}" for i in itertools.count())
        for group, depth in enumerate(self.groups):
            if group > 0:
                x = Transition(self.dtype, name=next(names))(x)
            for _ in range(depth):
                x = block(**fields, growth=self.growth, drop_path=drop_paths[group], name=next(names))(x)
                x = shard_batch(x)
        return x


def _variant(model: T2TViT, params: int, gmacs: float | None = None, top1: float | None = None) -> Variant:
    return Variant(model, params, gmacs, top1, crop=0.9)


VARIANTS = {
    "t2t_vit_7": _variant(T2TViT(256, 7, 4, 2), 4_255_694, 1.1, 71.7),
    "t2t_vit_10": _variant(T2TViT(256, 10, 4, 2), 5_834_702, 1.5, 75.2),
    "t2t_vit_12": _variant(T2TViT(256, 12, 4, 2), 6_887_374, 1.8, 76.5),
    "t2t_vit_14": _variant(T2TViT(384, 14, 6, 3), 21_465_806, 4.8, 81.5),
    "t2t_vit_19": _variant(T2TViT(448, 19, 7, 3), 39_085_070, 8.5, 81.9),
    "t2t_vit_24": _variant(T2TViT(512, 24, 8, 3), 64_000_974, 13.8, 82.3),
    "t2t_vit_t_14": _variant(T2TViT(384, 14, 6, 3, "transformer"), 21_465_422, 6.1, 81.7),
    "t2t_vit_t_19": _variant(T2TViT(448, 19, 7, 3, "transformer"), 39_084_686, 9.8, 82.4),
    "t2t_vit_t_24": _variant(T2TViT(512, 24, 8, 3, "transformer"), 64_000_590, 15.0, 82.6),
    # Studies of the paper (Tables 6 and 7). Their weights were not released.
    "t2t_vit_14_resnext": _variant(T2TViT(384, 14, 32, 3), 21_465_806, 4.8, 81.5),
    "t2t_vit_14_wide": _variant(T2TViT(768, 4, 12, 3), 25_000_910, 5.0, 77.9),
    "t2t_vit_14_se": _variant(T2TViT(384, 14, 6, 3, block=SEBlock), 21_723_854, 4.9, 81.6),
    "t2t_vit_16_ghost": _variant(T2TViT(384, 16, 6, 3, block=GhostBlock), 16_173_518, 3.7, 79.5),
    "t2t_vit_dense": _variant(T2TViTDense(128, 12, 8, 2), 23_617_750, 5.5, 80.6),
    "t2t_vit_c_14": _variant(T2TViT(384, 14, 6, 3, "convolution"), 21_346_344, 4.6, 80.8),
    # Not from the paper: for small images and small machines.
    "t2t_vit_micro": _variant(T2TViT(256, 2, 4, 2, num_classes=10, image_size=32), 1_369_584),
}
