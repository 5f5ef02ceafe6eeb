"""DETR: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020.

Equal to facebookresearch/detr and to mmdetection's (2.13) `DETRHead`, with which PVT's was trained; they differ in
`clip` alone, and in the names of their weights.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.heads import set_prediction
from vitpyramid.heads.detector import Detections, Targets, whole
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.heads.transformer import (
    BoxMLP,
    Dropout,
    MultiheadAttention,
    feed_forward,
    padding_mask,
    sine_positions,
    wide_dense,
)
from vitpyramid.models.initialisers import gaussian, torch_bias_init, torch_kernel_init
from vitpyramid.models.layers import LayerNorm, at_least_float32
from vitpyramid.models.sharding import shard_batch


class EncoderLayer(nn.Module):
    """Self-attention among the cells of the map, then an MLP, each followed by its norm (appendix A.3, Figure 10)."""

    heads: int
    ffn_channels: int
    drop_rate: float
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, padding: jax.Array) -> jax.Array:
        """`[B, N, C]`, positions of the same shape, padding bool `[B, N]` -> `[B, N, C]`."""
        drop = Dropout(self.drop_rate, deterministic=not self.train)
        attention = MultiheadAttention(self.heads, self.drop_rate, self.dtype, name="self_attn")
        there = x + positions
        x = LayerNorm(1e-5, self.dtype, name="norm1")(x + drop(attention(there, there, x, padding, self.train)))
        update = feed_forward(x, self.ffn_channels, self.drop_rate, self.dtype, self.train)
        return shard_batch(LayerNorm(1e-5, self.dtype, name="norm2")(x + drop(update)))


class DecoderLayer(nn.Module):
    """Attention among the objects, then from them to the map, then an MLP, each followed by its norm."""

    heads: int
    ffn_channels: int
    drop_rate: float
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, queries: jax.Array, memory: jax.Array, positions: jax.Array, padding: jax.Array
    ) -> jax.Array:
        """Objects `[B, Q, C]`, their queries likewise; the map, its positions and padding as in the encoder."""
        drop = Dropout(self.drop_rate, deterministic=not self.train)
        self_attention = MultiheadAttention(self.heads, self.drop_rate, self.dtype, name="self_attn")
        cross_attention = MultiheadAttention(self.heads, self.drop_rate, self.dtype, name="multihead_attn")
        there = x + queries
        x = LayerNorm(1e-5, self.dtype, name="norm1")(x + drop(self_attention(there, there, x, train=self.train)))
        update = cross_attention(x + queries, memory + positions, memory, padding, self.train)
        x = LayerNorm(1e-5, self.dtype, name="norm2")(x + drop(update))
        update = feed_forward(x, self.ffn_channels, self.drop_rate, self.dtype, self.train)
        return shard_batch(LayerNorm(1e-5, self.dtype, name="norm3")(x + drop(update)))


class Encoder(nn.Module):
    """The cells of the map look at each other."""

    layer: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, padding: jax.Array, train: bool) -> jax.Array:
        """As `EncoderLayer`."""
        for i in range(self.depth):
            x = self.layer(train=train, name=f"layers_{i}")(x, positions, padding)
        return x


class Decoder(nn.Module):
    """The objects look at each other and at the map; what each layer makes of them goes through one norm."""

    layer: Callable[..., nn.Module]
    depth: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, queries: jax.Array, memory: jax.Array, positions: jax.Array, padding: jax.Array, train: bool
    ) -> jax.Array:
        """As `DecoderLayer`, beginning with zeros -> `[L, B, Q, C]`, of every layer."""
        norm = LayerNorm(1e-5, self.dtype, name="norm")
        x, objects = jnp.zeros_like(queries), []
        for i in range(self.depth):
            x = self.layer(train=train, name=f"layers_{i}")(x, queries, memory, positions, padding)
            objects.append(norm(x))
        return jnp.stack(objects)


class Transformer(nn.Module):
    """Encoder and decoder (section 3.2).

    Attributes:
      encoder_layer, decoder_layer: make a layer, given `train` and its `name`; there are as many as the depths say.
    """

    encoder_layer: Callable[..., nn.Module]
    encoder_depth: int
    decoder_layer: Callable[..., nn.Module]
    decoder_depth: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, padding: jax.Array, queries: jax.Array, train: bool
    ) -> jax.Array:
        """The map and its positions `[B, N, C]`, padding bool `[B, N]`, queries `[B, Q, C]` -> `[L, B, Q, C]`."""
        memory = Encoder(self.encoder_layer, self.encoder_depth, name="encoder")(x, positions, padding, train)
        decoder = Decoder(self.decoder_layer, self.decoder_depth, self.dtype, name="decoder")
        return decoder(queries, memory, positions, padding, train)


class DETR(DenseNetwork, kw_only=True):
    """A transformer turns learned queries into a set of objects, on the coarsest level of the backbone.

    Attributes:
      channels: width of the transformer; half of it is for positions along each axis.
      heads, ffn_channels, encoder_layers, decoder_layers: of the transformer.
      queries: objects that are looked for, of which most are none.
      head_drop_rate: dropout in the transformer.
      most_detections: returned at most, and at most one a query.
      clip: detected boxes are cut at the image's border (not facebookresearch's).
      remat: recompute each layer, and each block of the backbone, in the backward pass.
      library: whose names the weights have in PyTorch, one of `libraries`.
    """

    channels: int = 256
    heads: int = 8
    ffn_channels: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 100
    head_drop_rate: float = 0.1
    most_detections: int = 100
    clip: bool = True
    remat: bool = False
    library: str = "mmdetection"

    after = ("input_proj", "query_embed", "transformer", "class_embed", "bbox_embed")
    class_layer = "class_embed"
    libraries = ("mmdetection", "facebookresearch", "huggingface")

    @nn.nowrap
    def classes_of(self, rows: int) -> int:
        """All but the last, which is "no object"."""
        return rows - 1

    @staticmethod
    def levels_of(strides) -> tuple[int, ...]:
        """The coarsest."""
        return (len(strides) - 1,)

    def __call__(self, images: jax.Array, train: bool = False) -> Detections:
        """Detections in images that fill the canvas."""
        return self.detect(images, train=train)

    def predict(
        self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """What every layer of the decoder says of a canvas `[B, H, W, 3]`; see `decode`."""
        level = self.backbone.features(images, train)[self.levels[0]]
        padding = padding_mask(whole(images, sizes), images.shape[1:3], level.x.shape[1:3])
        return self.decode(level.x, padding, train)

    @nn.compact
    def decode(self, x: jax.Array, padding: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """What every layer of the decoder says of a map.

        Args:
          x: `[B, h, w, C]`, of the backbone.
          padding: bool `[B, h, w]`, cells that are not of the image.

        Returns:
          Logits `[L, B, Q, num_classes + 1]` and boxes `[L, B, Q, 4]` as in `set_prediction`, both at least float32.
        """

        def layer(kind: type[nn.Module]) -> Callable[..., nn.Module]:
            kind = nn.remat(kind) if self.remat else kind
            return functools.partial(kind, self.heads, self.ffn_channels, self.head_drop_rate, self.dtype)

        batch, dim = len(x), self.channels
        inits = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(x.shape[-1])}
        x = nn.Conv(dim, (1, 1), dtype=self.dtype, **inits, name="input_proj")(x)
        positions = sine_positions(padding, dim, at_least_float32(self.dtype)).astype(self.dtype)
        queries = nn.Embed(self.queries, dim, embedding_init=gaussian(1.0), name="query_embed").embedding
        queries = jnp.broadcast_to(queries.astype(self.dtype), (batch, self.queries, dim))

        encoder, decoder = (layer(EncoderLayer), self.encoder_layers), (layer(DecoderLayer), self.decoder_layers)
        transformer = Transformer(*encoder, *decoder, self.dtype, name="transformer")
        tokens = x.reshape(batch, -1, dim), positions.reshape(batch, -1, dim), padding.reshape(batch, -1)
        objects = transformer(*tokens, queries, train)
        logits = wide_dense(self.num_classes + 1, dim, self.dtype, "class_embed")(objects)
        return logits, jax.nn.sigmoid(BoxMLP(self.dtype, name="bbox_embed")(objects))

    def losses(
        self, images: jax.Array, targets: Targets, sizes: jax.Array | None = None, train: bool = True
    ) -> dict[str, jax.Array]:
        """Of classes, boxes and their overlaps, `[decoder_layers]` each; the loss is the sum of all (section 3.1)."""
        sizes = whole(images, sizes)
        return set_prediction.set_losses(*self.predict(images, sizes, train), targets, sizes)

    def detect(self, images: jax.Array, sizes: jax.Array | None = None, train: bool = False) -> Detections:
        """What the last layer's queries have found."""
        sizes = whole(images, sizes)
        logits, boxes = self.predict(images, sizes, train)
        return set_prediction.detections(logits[-1], boxes[-1], sizes, most=self.most_detections, clip=self.clip)
