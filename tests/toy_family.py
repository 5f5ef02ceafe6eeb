"""A family that the package does not know: the model file that CONTRIBUTING.md asks for, and no more."""

import functools

import flax.linen as nn
import jax.numpy as jnp

from vitpyramid.models.attention import Block, SelfAttention
from vitpyramid.models.backbone import Backbone, Level, PositionTable, Stage, Variant
from vitpyramid.models.layers import Mlp, PatchConv, at_least_float32, normal_init, resize_positions
from vitpyramid.models.stack import apply_blocks


class Toy(Backbone):
    """Two stages of self-attention, at strides 8 and 16."""

    dim: int

    signature = "down/kernel"
    strides = (8, 16)
    least_side = 16
    no_weight_decay = ("pos_embed",)

    @property
    def stages(self):
        return (Stage(("entry", "pos_embed"), ("layers_0", "layers_1")), Stage(("down",), ("late_0",)))

    @property
    def position_tables(self):
        height, width = (side // 8 for side in self.height_width)
        return (PositionTable("params/pos_embed", (height, width)),)

    def setup(self):
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(self.num_classes, dtype=at_least_float32(self.dtype))

    @nn.compact
    def encode(self, images, train):
        self.check_images(images)
        drop_rate, drop_paths = self.drop_rate if train else 0.0, self.drop_paths(train)
        fields = {
            "attention": functools.partial(SelfAttention, 2, qkv_bias=True, drop_rate=drop_rate, dtype=self.dtype),
            "mlp": functools.partial(Mlp, 2, drop_rate, dtype=self.dtype),
            "epsilon": 1e-6,
            "dtype": self.dtype,
        }
        levels = []
        x = PatchConv(self.dim, 8, self.dtype, name="entry")(images)
        (native,) = self.position_tables
        table = self.param("pos_embed", normal_init, (1, native.grid[0] * native.grid[1], self.dim))
        positions = resize_positions(table, native.grid, x.shape[1:3], self.resize_method)
        x = x + positions.reshape(1, *x.shape[1:3], self.dim).astype(self.dtype)
        for name, rates in (("layers", drop_paths[:2]), ("late", drop_paths[2:])):
            if name == "late":
                x = PatchConv(self.dim, 2, self.dtype, name="down")(x)
            shape = x.shape
            x = apply_blocks(Block, fields, x.reshape(shape[0], -1, self.dim), rates, name, self.remat, self.scan)
            x = x.reshape(shape)
            levels.append(Level(x, self.strides[len(levels)]))
        return tuple(levels), jnp.mean(x, (1, 2))


VARIANTS = {
    "toy_thin": Variant(Toy(8, num_classes=10, image_size=32), params=3_842),
    "toy_wide": Variant(Toy(16, num_classes=10, image_size=32), params=11_258),
}
