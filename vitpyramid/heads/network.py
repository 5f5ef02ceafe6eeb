"""A network for dense prediction: a backbone and what stands on it."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models import initialisers
from vitpyramid.models.backbone import Backbone, Level, PositionTable, Stage


class DenseNetwork(nn.Module, kw_only=True):
    """A backbone and what stands on it.

    Images are a canvas `[B, H, W, 3]`: normalised, then padded with zeros on the right and below. `sizes` `[B, 2]` are
    heights and widths of the images in it; None: they fill it.

    Attributes:
      backbone: as `Backbone.dense` gives it.
      levels: which of its levels are read, 0 the finest.
      num_classes: without background.
      dtype: of the heads' activations and products; logits, boxes and losses are at least float32.

    Declared by a network:
      after: paths in `params` of what stands behind the backbone.
      class_layer: path in `params` of the layer that has the classes, and `classes_of` its rows.
      libraries: whose names the weights can have in PyTorch, where its `library` can be one of several.
    """

    backbone: Backbone
    levels: tuple[int, ...]
    num_classes: int = 80
    dtype: jnp.dtype = jnp.float32

    after: ClassVar[tuple[str, ...]]
    class_layer: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()

    @nn.nowrap
    def classes_of(self, rows: int) -> int:
        """`num_classes` of a network whose class layer has this many outputs."""
        return rows

    @nn.nowrap
    def init(self, rngs, images: jax.Array, train: bool = False, method: str | None = None) -> dict:
        """As `Backbone.init`."""
        return initialisers.init(self, rngs, images, train, method)

    @staticmethod
    def levels_of(strides: Sequence[int]) -> tuple[int, ...]:
        """Which levels of a backbone with these strides are read."""
        return tuple(range(len(strides)))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The backbone's."""
        return tuple(
            Stage(*(tuple(f"backbone/{path}" for path in paths) for paths in (stage.before, stage.blocks)))
            for stage in self.backbone.stages
        )

    @property
    def position_tables(self) -> tuple[PositionTable, ...]:
        """The backbone's."""
        tables = self.backbone.position_tables
        return tuple(dataclasses.replace(table, path=table.path.replace("/", "/backbone/", 1)) for table in tables)

    @property
    def resize_method(self) -> str:
        """The backbone's."""
        return self.backbone.resize_method

    @property
    def height_width(self) -> tuple[int, int]:
        """The backbone's."""
        return self.backbone.height_width

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """The backbone's."""
        return self.backbone.no_weight_decay

    def pyramid(self, images: jax.Array, train: bool = False) -> tuple[Level, ...]:
        """The neck's levels, `[B, h, w, C]`, finest first."""
        levels = self.backbone.features(images, train)
        return self.neck([levels[i] for i in self.levels])
