"""The contract of a backbone: what it is called with, what it returns, and what others may ask of its family."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models import initialisers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@flax.struct.dataclass
class Level:
    """One feature map of a pyramid.

    Attributes:
      x: `[B, h, w, C]` feature map.
      stride: input pixels per cell; `h` is about `H / stride`, rounded as the network rounds.
    """

    x: jax.Array
    stride: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One named network and what its authors published about it.

    Attributes:
      model: unbound module holding the variant's hyper-parameters.
      params: trainable parameters at the module's own `num_classes`.
      gmacs: published multiply-accumulates at 224 x 224, in units of 1e9; None where none were published.
      top1: published ImageNet top-1 in percent, of released weights or of the paper; None where there is none.
      crop: evaluation crop: the shorter side is resized to `floor(image_size / crop)` before the centre crop.
      interpolation: of the evaluation resize.
      mean, std: per-channel normalisation of images in `[0, 1]`.
    """

    model: "Backbone"
    params: int
    gmacs: float | None = None
    top1: float | None = None
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a network, by paths in `params`, parts joined by "/".

    Attributes:
      before: what stands between the blocks of the stage before and this one's: `("patch_embed2", "pos_embed2")`.
      blocks: each block, in order: `("block2_0", "block2_1")`.
    """

    before: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """A table of positions, `[1, extra + h * w, C]` or `[1, h, w, C]`.

    Attributes:
      path: in the variables, collection first, parts joined by "/": "params/pos_embed1", "constants/pos_embed".
      grid: `(h, w)` that it has rows for, at the module's `image_size`.
      extra: rows for class tokens in front of those of the grid.
    """

    path: str
    grid: tuple[int, int]
    extra: int = 0


class Backbone(nn.Module, kw_only=True):
    """A network of images: what the families share, and what each declares about itself.

    A family has `encode`, which gives the pyramid and what its head reads, and in `setup` a `norm` and a `head`.

    Attributes:
      num_classes: width of the logits.
      image_size: side, or height and width, of the images that the network is made for: position tables have its grid.
        Images of any other size can be given at call time; the tables are then resized.
      drop_rate: dropout after positions, projections and in the MLP.
      drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      scan: compile one block a stage and loop over it (`stack.apply_blocks`); needs `remat`.
      dtype: of activations and matrix products; norms' statistics, softmax and logits are at least float32.

    Declared by a family:
      signature: path in `params` that no other family has: by it weights are recognised.
      stages: blocks and what stands before them; with `after` they hold every parameter once.
      after: paths in `params` of what stands behind the last stage.
      strides: input pixels per cell of each level.
      level_dims: channels of each level, unless they are the field `dims`.
      least_side: of images, in pixels.
      no_weight_decay: last parts of paths of parameters that are not decayed, besides vectors, which never are.
      position_tables: all of them.
      resize_method: "bilinear" or "bicubic", of position tables.
    """

    num_classes: int = 1000
    image_size: int | tuple[int, int] = 224
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: jnp.dtype = jnp.float32

    signature: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    strides: ClassVar[tuple[int, ...]]
    after: ClassVar[tuple[str, ...]] = ("norm", "head", "head_dist")
    least_side: ClassVar[int] = 1
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    position_tables: ClassVar[tuple[PositionTable, ...]] = ()
    resize_method: ClassVar[str] = "bicubic"

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits `[B, num_classes]`, at least float32, of normalised images `[B, H, W, 3]`.

        `train=True` turns dropout and drop path on, which then need a `dropout` RNG if their rates are not zero; a
        family with batch norm then normalises with the batch's statistics and updates the running ones, for which
        `batch_stats` must be mutable.

        Raises:
          ValueError: images of another rank, of other than three channels, of integers, or a side less than
            `least_side`.
        """
        return self.head(self.norm(self.encode(images, train)[1]))

    @nn.nowrap
    def init(self, rngs, images: jax.Array, train: bool = False, method: str | None = None) -> dict:
        """The variables at the start, as `flax.linen.Module.init` makes them, in a program that compiles in seconds.

        Args:
          rngs: a key, or keys by stream, of which `params` is drawn from.
          images: `[B, H, W, 3]` floats; only shape and dtype are read.
          train, method: of the call that makes the variables.
        """
        return initialisers.init(self, rngs, images, train, method)

    def features(self, images: jax.Array, train: bool = False) -> tuple[Level, ...]:
        """Output of each stage's last block as a map, without norm, finest first; arguments as for logits."""
        return self.encode(images, train)[0]

    @nn.nowrap
    def dense(self, levels: Sequence[int]) -> "Backbone":
        """The network as its paper put it under a head of dense prediction, for `features` alone.

        Args:
          levels: which of its levels the head reads, 0 the finest.
        """
        return self

    @property
    def level_dims(self) -> tuple[int, ...]:
        """Channels of each level of the pyramid."""
        return tuple(self.dims)

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` in both directions."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @nn.nowrap
    def check_images(self, images: jax.Array) -> None:
        """Raises `ValueError` for images that are no floats `[B, H, W, 3]`, or smaller than `least_side`."""
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < self.least_side:
            raise ValueError(
                f"images have shape {images.shape}, expected [B, H, W, 3] with H and W at least {self.least_side}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):  # they would give logits, of nothing
            raise ValueError(f"images are {images.dtype}, expected normalised floats")

    @nn.nowrap
    def drop_paths(self, train: bool) -> list[float]:
        """Rate of stochastic depth of each block, over all stages; zeros outside of training."""
        blocks = sum(len(stage.blocks) for stage in self.stages)
        return np.linspace(0, self.drop_path_rate if train else 0.0, blocks).tolist()

    @nn.nowrap
    def entrance_grids(self, height: int, width: int) -> dict[str, tuple[int, int]]:
        """Grid of the tokens of each attention that stands before the first stage, by path, for images of this size."""
        return {}

    @nn.nowrap
    def native_side(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Side of the square images that the position tables of some weights are for; the inverse of `image_size`.

        Args:
          shapes: of the weights, by path, collection first, parts joined by "/".

        Returns:
          None where the family has no position tables, or the first of them is no square grid's.
        """
        table = next(iter(self.position_tables), None)
        if table is None or table.path not in shapes:
            return None
        cells = math.prod(shapes[table.path][1:-1]) - table.extra
        grid_side = math.isqrt(max(cells, 0))
        side = self.image_side(grid_side)
        return side if grid_side > 0 and grid_side**2 == cells and side >= self.least_side else None

    @nn.nowrap
    def image_side(self, grid_side: int) -> int:
        """Side of the square images whose finest grid has `grid_side` rows."""
        return grid_side * self.strides[0]


class DistilledBackbone(Backbone, kw_only=True):
    """A backbone whose heads read class tokens, `[B, 1 or 2, C]`: DeiT's distillation (DeiT paper, section 4).

    Attributes:
      distilled: a second class token with a head of its own, `head_dist`, which learns from a teacher.
    """

    distilled: bool = False

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
        """As `Backbone`; a distilled network gives `(class_logits, distill_logits)` in training, else their mean."""
        class_tokens = self.norm(self.encode(images, train)[1])
        class_logits = self.head(class_tokens[:, 0])
        if not self.distilled:
            return class_logits
        distill_logits = self.head_dist(class_tokens[:, 1])
        return (class_logits, distill_logits) if train else (class_logits + distill_logits) / 2
