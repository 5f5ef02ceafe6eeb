"""What the transformers of detectors are made of: masks of padding, positions, attention from one set to another."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.initialisers import torch_bias_init, torch_kernel_init, xavier_uniform
from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.token_forms import scaled_logits


def padding_mask(sizes: jax.Array, canvas: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
    """Which cells of a map lie in the padding: bool `[B, *grid]`.

    That is the canvas' mask resized as PyTorch's `interpolate(mode="nearest")` does: a cell is what the pixel at its
    upper left is.

    Args:
      sizes: `[B, 2]`, height and width of the images in the canvas.
      canvas: its height and width.
    """
    beyond = []
    for axis, (side, cells) in enumerate(zip(canvas, grid, strict=True)):
        # PyTorch takes the product in float32, which can come out below a whole number.
        pixel = np.floor(np.arange(cells, dtype=np.float32) * np.float32(side / cells)).astype(np.int32)
        beyond.append(np.minimum(pixel, side - 1) >= jnp.asarray(sizes)[:, axis, None])
    return beyond[0][:, :, None] | beyond[1][:, None, :]


def sine_positions(padding: jax.Array, channels: int, dtype=jnp.float32, offset: float = 0.0) -> jax.Array:
    """Sines and cosines of each cell's place among those that are not padding (DETR, appendix A.4).

    Args:
      padding: bool `[B, h, w]`.
      channels: half are of rows, half of columns, in each of which sines and cosines alternate.
      offset: added to the count, which begins at 1. Deformable DETR has -0.5; where the count is 0, in padding, what it
        gives is then of no meaning.

    Returns:
      `[B, h, w, channels]` in `dtype`.
    """
    parts = []
    for axis in (1, 2):
        count = jnp.cumsum(~padding, axis=axis, dtype=dtype)
        last = jax.lax.slice_in_dim(count, -1, None, axis=axis)
        parts.append(sines((count + offset) / (last + 1e-6) * (2 * math.pi), channels // 2))
    return jnp.concatenate(parts, axis=-1)


def sines(angle: jax.Array, channels: int) -> jax.Array:
    """Sines and cosines in turns, of an angle over wavelengths from 1 to 10,000: `[...]` -> `[..., channels]`."""
    wavelengths = 10000.0 ** (2 * np.arange(channels // 2) / channels)
    turns = angle[..., None] / jnp.asarray(wavelengths, angle.dtype)
    return jnp.stack([jnp.sin(turns), jnp.cos(turns)], axis=-1).reshape(*angle.shape, -1)


def dense(x: jax.Array, features: int, dtype, name: str) -> jax.Array:
    """A linear layer as DETR's transformers begin with: Xavier's weights, PyTorch's biases. For compact methods."""
    bias_init = torch_bias_init(x.shape[-1])
    return nn.Dense(features, dtype=dtype, kernel_init=xavier_uniform, bias_init=bias_init, name=name)(x)


class InProjection(nn.Module):
    """Projections of queries, keys and values; the weights stand beside each other, as PyTorch has them."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
        """Three of `[..., C]` -> the same shapes."""
        dim = inputs[0].shape[-1]
        kernel = self.param("kernel", xavier_uniform, (dim, 3 * dim)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * dim,)).astype(self.dtype)
        parts = zip(inputs, jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return [x.astype(self.dtype) @ part + shift for x, part, shift in parts]


class Dropout(nn.Dropout):
    """Computed by itself on a TPU, whose compiler crashes on dropout in the same operation as matrix products."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[...]` -> the same."""
        if self.deterministic or self.rate == 0:
            return x
        return _apart(super().__call__(_apart(x)))


def _apart(x):
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


class MultiheadAttention(nn.Module):
    """PyTorch's: attention from one set to another, with projections; single weights of the map are dropped.

    The map is sown as `attention` `[B, heads, N, M]` under `intermediates`.
    """

    heads: int
    drop_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, padding: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Queries `[B, N, C]`, keys and values `[B, M, C]` -> `[B, N, C]`.

        Args:
          padding: bool `[B, M]`: keys that nothing attends to.
        """
        projected = InProjection(self.dtype, name="in_proj")(query, key, value)
        query, key, value = (x.reshape(*x.shape[:2], self.heads, -1) for x in projected)
        logits = scaled_logits(query, key, query.shape[-1] ** -0.5)
        if padding is not None:
            logits = jnp.where(padding[:, None, None], -jnp.inf, logits)
        weights = jax.nn.softmax(logits)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "attention", weights)
        weights = Dropout(self.drop_rate, deterministic=not train)(weights.astype(value.dtype))
        out = jnp.einsum("bhnm,bmhd->bnhd", weights, value).reshape(projected[0].shape)
        # Its biases begin at zero, those of other linear layers do not.
        return nn.Dense(out.shape[-1], dtype=self.dtype, kernel_init=xavier_uniform, name="out_proj")(out)


def feed_forward(x: jax.Array, channels: int, drop_rate: float, dtype, train: bool) -> jax.Array:
    """`linear1`, ReLU, dropout, `linear2`: `[..., C]` -> `[..., C]`. For compact methods."""
    hidden = Dropout(drop_rate, deterministic=not train)(nn.relu(dense(x, channels, dtype, "linear1")))
    return dense(hidden, x.shape[-1], dtype, "linear2")


def wide_dense(
    features: int,
    width: int,
    dtype,
    name: str | None = None,
    kernel_init: Callable = torch_kernel_init,
    bias_init: Callable | None = None,
) -> nn.Dense:
    """A linear layer from `width` channels to logits or to a box, at least float32; it begins as PyTorch's.

    A box is in parts of the image: in bfloat16 it would move by whole pixels.
    """
    bias_init = bias_init or torch_bias_init(width)
    return nn.Dense(features, dtype=at_least_float32(dtype), kernel_init=kernel_init, bias_init=bias_init, name=name)


class BoxMLP(nn.Module):
    """Three linear layers with ReLU between them, to the numbers of a box before their sigmoid.

    Attributes:
      last: the last one's `kernel_init` and `bias_init`, where they are not PyTorch's.
    """

    dtype: jnp.dtype
    last: tuple[tuple[str, Callable], ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., 4]`, at least float32."""
        dim = x.shape[-1]
        inits = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(dim)}
        for i in range(2):
            x = nn.relu(nn.Dense(dim, dtype=self.dtype, **inits, name=f"layers_{i}")(x))
        return wide_dense(4, dim, self.dtype, "layers_2", **dict(self.last))(x)
