"""The transformer of Deformable DETR: Zhu et al., "Deformable DETR", ICLR 2021, section 4."""

import math
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.heads.deformable_attention import DeformableAttention, Grids
from vitpyramid.heads.transformer import Dropout, MultiheadAttention, feed_forward, sines, wide_dense
from vitpyramid.models.initialisers import gaussian, torch_bias_init, xavier_uniform
from vitpyramid.models.layers import LayerNorm
from vitpyramid.models.sharding import shard_batch


@flax.struct.dataclass
class Cells:
    """The cells of all levels, row-major, one level behind the other: S of them.

    Attributes:
      x: `[B, S, C]`.
      inside: bool `[B, S]`: of the image, not of the padding.
      ratios: `[B, L, 2]`: which part of each map's width and height the image takes.
      grids: (height, width) of each level.
    """

    x: jax.Array
    inside: jax.Array
    ratios: jax.Array
    grids: Grids = flax.struct.field(pytree_node=False)


class EncoderLayer(nn.Module):
    """Each cell looks at a few places in every level, then an MLP, each followed by its norm (section 4.1)."""

    heads: int
    levels: int
    points: int
    ffn_channels: int
    drop_rate: float
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, cells: Cells, positions: jax.Array, reference: jax.Array) -> Cells:
        """Positions `[B, S, C]` and the cells' own places `[B, S, L, 2]` -> the cells."""
        x, drop = cells.x, Dropout(self.drop_rate, deterministic=not self.train)
        attention = DeformableAttention(self.heads, self.levels, self.points, self.dtype, name="self_attn")
        update = attention(x + positions, reference, x, cells.grids, cells.inside)
        x = LayerNorm(1e-5, self.dtype, name="norm1")(x + drop(update))
        update = feed_forward(x, self.ffn_channels, self.drop_rate, self.dtype, self.train)
        x = shard_batch(LayerNorm(1e-5, self.dtype, name="norm2")(x + drop(update)))
        return cells.replace(x=x)


class DecoderLayer(nn.Module):
    """Attention among the objects, then from them to a few places in every level, then an MLP, each with its norm."""

    heads: int
    levels: int
    points: int
    ffn_channels: int
    drop_rate: float
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, queries: jax.Array, reference: jax.Array, memory: Cells) -> jax.Array:
        """Objects `[B, Q, C]`, their queries likewise, where they are `[B, Q, L, 2 or 4]` -> `[B, Q, C]`."""
        drop = Dropout(self.drop_rate, deterministic=not self.train)
        self_attention = MultiheadAttention(self.heads, self.drop_rate, self.dtype, name="self_attn")
        cross_attention = DeformableAttention(self.heads, self.levels, self.points, self.dtype, name="cross_attn")
        there = x + queries
        x = LayerNorm(1e-5, self.dtype, name="norm2")(x + drop(self_attention(there, there, x, train=self.train)))
        update = cross_attention(x + queries, reference, memory.x, memory.grids, memory.inside)
        x = LayerNorm(1e-5, self.dtype, name="norm1")(x + drop(update))
        update = feed_forward(x, self.ffn_channels, self.drop_rate, self.dtype, self.train)
        return shard_batch(LayerNorm(1e-5, self.dtype, name="norm3")(x + drop(update)))


class Encoder(nn.Module):
    """The cells of all levels look at each other."""

    layer: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, cells: Cells, positions: jax.Array, train: bool) -> Cells:
        """As `EncoderLayer`."""
        reference = _centres(cells)[:, :, None] * cells.ratios[:, None]
        for i in range(self.depth):
            cells = self.layer(train=train, name=f"layers_{i}")(cells, positions, reference)
        return cells


class Decoder(nn.Module):
    """The objects look at each other and at the cells; after each layer their boxes are read."""

    layer: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(
        self, x: jax.Array, queries: jax.Array, reference: jax.Array, memory: Cells, read: Callable, train: bool
    ) -> list:
        """What `read` makes of each layer's objects.

        Args:
          x, queries: `[B, Q, C]`.
          reference: `[B, Q, 2 or 4]`, in 0 .. 1 of the image.
          read: of the layer's number, objects and `reference`: anything, and the reference of the next layer.
        """
        found = []
        for i in range(self.depth):
            ratios = jnp.tile(memory.ratios, reference.shape[-1] // 2)
            there = reference[:, :, None] * ratios[:, None]
            x = self.layer(train=train, name=f"layers_{i}")(x, queries, there, memory)
            of_layer, reference = read(i, x, reference)
            found.append(of_layer)
        return found


class Transformer(nn.Module):
    """Encoder, decoder, and where the decoder begins: learned queries, or in two stages the encoder's best boxes."""

    encoder: Encoder
    decoder: Decoder
    levels: int
    channels: int
    two_stage: bool
    dtype: jnp.dtype

    def setup(self):
        self.level_embed = self.param("level_embed", gaussian(1.0), (self.levels, self.channels))
        if self.two_stage:
            self.enc_output = self._linear(self.channels)
            self.enc_output_norm = LayerNorm(1e-5, self.dtype)
            self.pos_trans = self._linear(2 * self.channels)
            self.pos_trans_norm = LayerNorm(1e-5, self.dtype)
        else:
            zeros = nn.initializers.zeros
            self.reference_points = wide_dense(2, self.channels, self.dtype, None, xavier_uniform, zeros)

    def _linear(self, width: int) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, kernel_init=xavier_uniform, bias_init=torch_bias_init(width))

    def encode(self, cells: Cells, positions: jax.Array, train: bool) -> Cells:
        """The cells once they have looked at each other; `positions` `[B, S, C]` are those within each level."""
        of_level = jnp.repeat(self.level_embed, np.array([h * w for h, w in cells.grids]), axis=0)
        return self.encoder(cells, positions + of_level.astype(positions.dtype), train)

    def begin(self, embedding: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Objects and queries `[B, Q, C]`, references `[B, Q, 2]`, of learned ones `[B, Q, 2 C]`."""
        queries, objects = jnp.split(embedding, 2, axis=-1)
        return objects, queries, jax.nn.sigmoid(self.reference_points(queries))

    def candidates(self, memory: Cells) -> tuple[jax.Array, jax.Array]:
        """What boxes are read from, `[B, S, C]`, and what is added to them before the sigmoid, `[B, S, 4]`."""
        centres = _centres(memory)
        sides = [jnp.full((h * w, 2), 0.05 * 2**level) for level, (h, w) in enumerate(memory.grids)]
        sides = jnp.broadcast_to(jnp.concatenate(sides).astype(centres.dtype), centres.shape)
        boxes = jnp.concatenate([centres, sides], axis=-1)
        there = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdims=True) & memory.inside[..., None]
        x = self.enc_output_norm(self.enc_output(jnp.where(there, memory.x, 0)))
        boxes = jnp.where(there, boxes, 0.5)
        return x, jnp.where(there, jnp.log(boxes / (1 - boxes)), jnp.inf)

    def begin_at(self, boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `begin`, of boxes `[B, Q, 4]`."""
        embedding = sines(boxes * (2 * math.pi), self.channels // 2).reshape(*boxes.shape[:2], -1)
        embedding = self.pos_trans_norm(self.pos_trans(embedding.astype(self.dtype)))
        queries, objects = jnp.split(embedding, 2, axis=-1)
        return objects, queries, boxes


def _centres(cells: Cells) -> jax.Array:
    """`[B, S, 2]`: x and y of every cell's centre, in 0 .. 1 of the image; beyond it in the padding."""
    centres = []
    for level, (height, width) in enumerate(cells.grids):
        y, x = np.mgrid[:height, :width].reshape(2, -1) + 0.5
        sides = cells.ratios[:, level, None] * np.array([width, height])
        centres.append(jnp.asarray(np.stack([x, y], axis=-1), sides.dtype) / sides)
    return jnp.concatenate(centres, axis=1)
