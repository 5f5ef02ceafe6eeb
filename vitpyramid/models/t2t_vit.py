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

from vitpyramid.models.attention import Block, SelfAttention, attend, output_dropout
from vitpyramid.models.backbone import Backbone, Level, PositionTable, Stage, Variant
from vitpyramid.models.layers import Mlp, PackedLinear, at_least_float32, linear, normal_init, torch_bias_init
from vitpyramid.models.sharding import shard_batch
from vitpyramid.models.stack import apply_blocks
from vitpyramid.models.t2t_module import TokensToToken, split_grids, token_grid


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


class SEAttention(SelfAttention):
    """Self-attention with squeeze-and-excitation behind the projection (paper section 3.2)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        query, key, value = PackedLinear(3, self.heads, self.dtype, self.qkv_bias, name="qkv")(x)
        x = linear(x.shape[-1], self.dtype, "proj")(attend(self, query, key, value, self.scale))
        x = SqueezeExcitation(self.dtype, name="se_layer")(x)
        return output_dropout(self.drop_rate)(x)


class CheapOperation(nn.Module):
    """One factor a channel: a depthwise convolution of width 1, stored and initialised (in [-1, 1]) as PyTorch does."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        return x * self.param("kernel", torch_bias_init(1), (1, 1, x.shape[-1])).astype(self.dtype)

    @nn.nowrap
    def elementwise_macs(self, out: jax.Array) -> int:
        """Multiply-accumulates of the convolution, for `tools.summary`, which cannot see them in a product."""
        return out.size


class GhostAttention(SelfAttention):
    """Self-attention whose query, key and value are computed by half (paper section 3.2).

    The other half is a multiple of the first.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        b, n, dim = x.shape
        packed = []
        for name in ("q", "k", "v"):
            half = linear(dim // 2, self.dtype, name, self.qkv_bias)(x)
            ghost = CheapOperation(self.dtype, name=f"cheap_operation_{name}")(half)
            packed.append(jnp.concatenate([half, ghost], axis=-1).reshape(b, n, self.heads, -1))
        x = linear(dim, self.dtype, "proj")(attend(self, *packed, self.scale))
        return output_dropout(self.drop_rate)(x)


class GhostMlp(nn.Module):
    """MLP that computes the first C channels of its hidden layer; the others are GELUs of multiples of these."""

    ratio: int
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        dim = x.shape[-1]
        gelu = functools.partial(nn.gelu, approximate=False)
        x = gelu(linear(dim, self.dtype, "fc1")(x))
        multiples = [CheapOperation(self.dtype, name=f"cheap_operation{i}")(x) for i in range(2, self.ratio + 1)]
        x = jnp.concatenate([x, *map(gelu, multiples)], axis=-1)  # [B, N, ratio * C]
        x = nn.Dropout(self.drop_rate, deterministic=False)(x)
        x = linear(dim, self.dtype, "fc2")(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


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


class T2TViT(Backbone):
    """Tokens-to-token module and a deep, narrow backbone of transformer blocks.

    The one map is of the patch tokens, at stride 16; its sides are `token_grid(H, W)`.

    Attributes:
      embed_dim, depth, heads, mlp_ratio: of the backbone, Table 1 of the paper (depth as in the code and weights).
      tokens_type: kind of the tokens-to-token module: "performer", "transformer" or "convolution".
      attention, mlp: classes that the backbone's blocks are made of.
      qk_scale: of the attention logits of the backbone; None: `d ** -0.5` for heads of width `d`, as the published
        weights were trained.
      token_drop_rate: dropout of the performer. It is 0.1 in the official code whatever the other rates are.
    """

    embed_dim: int
    depth: int
    heads: int
    mlp_ratio: float
    tokens_type: str = "performer"
    attention: type[nn.Module] = SelfAttention
    mlp: type[nn.Module] = Mlp
    qk_scale: float | None = None
    token_drop_rate: float = 0.1

    signature = "tokens_to_token/project/kernel"
    strides = (16,)
    least_side = 3
    no_weight_decay = ("cls_token",)

    @property
    def level_dims(self) -> tuple[int, ...]:
        """Of the one map there is."""
        return (self.embed_dim,)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        return (Stage(("tokens_to_token", "cls_token"), tuple(f"blocks_{j}" for j in range(self.depth))),)

    @property
    def position_tables(self) -> tuple[PositionTable, ...]:
        """The sinusoid, which is not trained."""
        return (PositionTable("constants/pos_embed", token_grid(*self.height_width), extra=1),)

    @nn.nowrap
    def entrance_grids(self, height: int, width: int) -> dict[str, tuple[int, int]]:
        """Those between the soft splits."""
        paths = [f"tokens_to_token/attention{i}" for i in (1, 2)]
        return {} if self.tokens_type == "convolution" else dict(zip(paths, split_grids(height, width), strict=False))

    def setup(self):
        self.norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False)
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype), kernel_init=normal_init)

    @nn.compact
    def encode(self, images: jax.Array, train: bool) -> tuple[tuple[Level, ...], jax.Array]:
        """The map and the class token `[B, C]`."""
        self.check_images(images)
        token_drop_rate, drop_rate = (self.token_drop_rate, self.drop_rate) if train else (0.0, 0.0)
        tokens_to_token = TokensToToken(
            self.embed_dim, self.tokens_type, token_drop_rate, self.remat, self.dtype, name="tokens_to_token"
        )
        x = tokens_to_token(images)
        b, *grid, dim = x.shape
        x = x.reshape(b, -1, dim)  # [B, h * w, C]
        class_token = self.param("cls_token", normal_init, (1, 1, dim))
        class_token = jnp.broadcast_to(class_token, (b, 1, dim)).astype(self.dtype)
        x = jnp.concatenate([class_token, x], axis=1)  # [B, 1 + h * w, C]
        x = x + self.positions(x.shape[1], dim).astype(self.dtype)
        x = shard_batch(nn.Dropout(drop_rate, deterministic=False)(x))
        x = self.backbone(
            x,
            {
                "attention": functools.partial(
                    self.attention, self.heads, False, self.qk_scale, drop_rate, dtype=self.dtype
                ),
                "mlp": functools.partial(self.mlp, self.mlp_ratio, drop_rate, dtype=self.dtype),
                "epsilon": 1e-5,
                "dtype": self.dtype,
            },
            self.drop_paths(train),
        )
        return (Level(x[:, 1:].reshape(b, *grid, -1), self.strides[0]),), x[:, 0]

    def positions(self, tokens: int, dim: int) -> jax.Array:
        """Sinusoid `[1, tokens, dim]`: the stored one if it has as many tokens, else one made for them."""
        (native,) = self.position_tables
        slots = native.extra + native.grid[0] * native.grid[1]
        stored = self.variable("constants", "pos_embed", lambda: jnp.asarray(sinusoid(slots, dim))).value
        return stored if stored.shape[1] == tokens else jnp.asarray(sinusoid(tokens, dim))

    def backbone(self, x: jax.Array, fields: dict, drop_paths: list[float]) -> jax.Array:
        """The blocks one after another, `[B, N, C]` -> `[B, N, C]`; `fields` are those that all blocks share."""
        return apply_blocks(Block, fields, x, drop_paths, "blocks", self.remat, self.scan)


class T2TViTDense(T2TViT):
    """T2T-ViT with dense connections: each block widens its input, a transition between groups halves the width.

    Blocks differ in shape: `scan` other than False is a `ValueError`. `depth` is the length of the drop path schedule,
    as in the official code, which builds it for 12 blocks and gives all blocks of group `g` its entry `g`.

    Attributes:
      groups: blocks in each group.
      growth: channels that a block appends.
    """

    groups: tuple[int, ...] = (3, 6, 6, 4)
    growth: int = 64

    @property
    def level_dims(self) -> tuple[int, ...]:
        """What the last group ends with."""
        dim = 2 * self.embed_dim
        for depth in self.groups:
            dim = dim // 2 + depth * self.growth
        return (dim,)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One; its list of blocks has the transitions in it."""
        (stage,) = super().stages
        count = sum(self.groups) + len(self.groups) - 1
        return (Stage(stage.before, tuple(f"blocks_{j}" for j in range(count))),)

    @nn.nowrap
    def drop_paths(self, train: bool) -> list[float]:
        """Rate of stochastic depth of each group."""
        return np.linspace(0, self.drop_path_rate if train else 0.0, self.depth).tolist()[: len(self.groups)]

    def backbone(self, x: jax.Array, fields: dict, drop_paths: list[float]) -> jax.Array:
        """Groups of blocks with transitions between them, `[B, N, C]` -> `[B, N, C']`; numbered as one list."""
        if self.scan:
            raise ValueError("scan=True: expected False, dense blocks differ in shape and cannot be one loop")
        block = nn.remat(DenseBlock) if self.remat else DenseBlock
        names = (f"blocks_{i}" for i in itertools.count())
        for group, (depth, drop_path) in enumerate(zip(self.groups, drop_paths, strict=True)):
            if group > 0:
                x = Transition(self.dtype, name=next(names))(x)
            for _ in range(depth):
                x = block(**fields, growth=self.growth, drop_path=drop_path, name=next(names))(x)
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
    "t2t_vit_14_se": _variant(T2TViT(384, 14, 6, 3, attention=SEAttention), 21_723_854, 4.9, 81.6),
    "t2t_vit_16_ghost": _variant(T2TViT(384, 16, 6, 3, attention=GhostAttention, mlp=GhostMlp), 16_173_518, 3.7, 79.5),
    "t2t_vit_dense": _variant(T2TViTDense(128, 12, 8, 2), 23_617_750, 5.5, 80.6),
    "t2t_vit_c_14": _variant(T2TViT(384, 14, 6, 3, "convolution"), 21_346_344, 4.6, 80.8),
    # Not from the paper: for small images and small machines.
    "t2t_vit_micro": _variant(T2TViT(256, 2, 4, 2, num_classes=10, image_size=32), 1_369_584),
}
