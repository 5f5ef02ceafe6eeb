"""The contract of a backbone: what it returns (`Level`) and what is known about it (`Variant`)."""

import dataclasses

import flax
import flax.linen as nn
import jax

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

    model: nn.Module
    params: int
    gmacs: float | None = None
    top1: float | None = None
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
