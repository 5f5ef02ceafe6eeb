"""Layers that the families share: initialisers, patch convolution, MLP, drop path, position tables."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models import forms, mlp_forms, token_forms
from vitpyramid.models.forms import at_least_float32
from vitpyramid.models.initialisers import normal_init, torch_bias_init, torch_kernel_init


def linear(features: int, dtype, name: str, use_bias: bool = True, torch_init_from: int | None = None) -> nn.Dense:
    """Dense layer: normal weights and zero bias, or PyTorch's default where `torch_init_from` gives the input width."""
    if torch_init_from is None:
        inits = {"kernel_init": normal_init}
    else:
        inits = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(torch_init_from)}
    return nn.Dense(features, use_bias, dtype, dot_general=forms.dense_product, name=name, **inits)


class PackedLinear(nn.Module):
    """`parts` dense layers into heads with one `kernel [C, parts * C]` and, if `use_bias`, `bias [parts * C]`.

    Their weights stand beside each other, `[part 0 | part 1 | ...]`, each head-major; initialised as `linear`'s.
    """

    parts: int
    heads: int
    dtype: jnp.dtype
    use_bias: bool = True
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B, N, C]` -> `parts` arrays `[B, N, heads, C / heads]`."""
        dim = x.shape[-1]
        kernel_init = torch_kernel_init if self.torch_init else normal_init
        bias_init = torch_bias_init(dim) if self.torch_init else nn.initializers.zeros
        kernel = self.param("kernel", kernel_init, (dim, self.parts * dim))
        bias = self.param("bias", bias_init, (self.parts * dim,)) if self.use_bias else None
        return forms.packed_linear(x, kernel, bias, self.heads, self.parts, self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over channels, statistics in at least float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return token_forms.layer_norm(x, scale, bias, self.epsilon, self.dtype)


class PatchConv(nn.Module):
    """Convolution whose kernel equals its stride, without padding: patches do not overlap.

    Rows and columns that do not fill a patch are dropped, as VALID padding does.
    Parameters are those of the convolution: `kernel [p, p, C_in, C_out]`, `bias [C_out]`, initialised as PyTorch does.
    """

    features: int
    patch: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H // p, W // p, C_out]`."""
        p, c = self.patch, x.shape[-1]
        kernel = self.param("kernel", torch_kernel_init, (p, p, c, self.features))
        bias = self.param("bias", torch_bias_init(p * p * c), (self.features,))
        return forms.patch_product(x, kernel, bias, self.dtype)


class Mlp(nn.Module):
    """`fc1 -> GELU -> fc2`, with dropout after both. GELU is the exact (erf) form.

    Attributes:
      ratio: width between the layers, in widths of a token.
      torch_init: initialise as PyTorch does instead of with normal weights and zero biases.
    """

    ratio: float
    drop_rate: float = 0.0
    torch_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        dim = x.shape[-1]
        hidden = int(dim * self.ratio)
        x = linear(hidden, self.dtype, "fc1", torch_init_from=dim if self.torch_init else None)(x)
        x = token_forms.gelu(x)
        x = nn.Dropout(self.drop_rate, deterministic=False)(x)
        x = linear(dim, self.dtype, "fc2", torch_init_from=hidden if self.torch_init else None)(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)

    @nn.nowrap
    def turns(self, x: jax.Array) -> int:
        """In how many turns a TPU computes this of `x` `[B, N, C]`, with the norm before it; 1: all at once."""
        if self.drop_rate or x.dtype != self.dtype:
            return 1
        return mlp_forms.mlp_turns(x.shape, int(x.shape[-1] * self.ratio), x.dtype)


def batch_norm_variables(module: nn.Module, dim: int) -> tuple[jax.Array, jax.Array, nn.Variable, nn.Variable]:
    """Scale, shift, running mean and running variance, `[dim]` each; called from a compact method of `module`."""
    scale = module.param("scale", nn.initializers.ones, (dim,))
    bias = module.param("bias", nn.initializers.zeros, (dim,))
    mean = module.variable("batch_stats", "mean", jnp.zeros, (dim,))
    return scale, bias, mean, module.variable("batch_stats", "var", jnp.ones, (dim,))


def update_running(running_mean: nn.Variable, running_var: nn.Variable, mean, var, n: int) -> None:
    """Takes the statistics of a batch, of `n` values a channel, into the running ones; `var` is the biased one."""
    running_mean.value = 0.9 * running_mean.value + 0.1 * mean
    running_var.value = 0.9 * running_var.value + 0.1 * var * (n / (n - 1))


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch has it, epsilon 1e-5, momentum 0.1.

    Batches are normalised with the biased variance; the running one takes the unbiased, where Flax's own module takes
    the biased. Statistics are in at least float32, in two passes. In a jitted step over a sharded batch they are those
    of the whole batch. `train=True` uses the batch's statistics and updates the running ones (`batch_stats`).
    """

    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> the same. Raises `ValueError` in training where a channel has a single value."""
        c = x.shape[-1]
        scale, bias, running_mean, running_var = batch_norm_variables(self, c)
        x = x.astype(at_least_float32(self.dtype))
        mean, var = running_mean.value, running_var.value
        if self.train:
            n = x.size // c
            if n < 2:
                raise ValueError(f"batch norm got {x.shape} in training, expected more than one value in each channel")
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
            if not self.is_initializing():
                update_running(running_mean, running_var, mean, var, n)
        return ((x - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias).astype(self.dtype)


class DropPath(nn.Module):
    """Stochastic depth: drops the whole branch of a sample with probability `rate`, scales the kept ones."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, ...]` -> `[B, ...]`."""
        if isinstance(self.rate, float) and self.rate == 0.0:
            return x
        return jnp.where(self._keep(x.shape[0], x.ndim), x / (1.0 - self.rate), 0).astype(x.dtype)

    def divisor(self, batch: int, dtype) -> jax.Array:
        """What a branch `[B, N, C]` is divided by instead, `[B, 1, 1]`: infinity drops it."""
        if isinstance(self.rate, float) and self.rate == 0.0:
            return jnp.ones((batch, 1, 1), dtype)
        return jnp.where(self._keep(batch, 3), 1.0 - self.rate, jnp.inf).astype(dtype)

    @nn.nowrap
    def _keep(self, batch, ndim):
        return jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, (batch,) + (1,) * (ndim - 1))


def resize_positions(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int], method: str) -> jax.Array:
    """Position table of one grid, resampled for another: PyTorch's `interpolate(align_corners=False)`.

    Args:
      table: `[1, h * w, C]`, row-major over `grid = (h, w)`.
      new_grid: `(h', w')`.
      method: "bilinear" or "bicubic", both without antialiasing.

    Returns:
      `[1, h' * w', C]`; `table` itself where the grids agree.
    """
    if grid == new_grid:
        return table
    weights = {"bilinear": _bilinear_weight, "bicubic": _bicubic_weight}[method]
    rows, columns = (
        jnp.asarray(_resampling(*sizes, weights), table.dtype) for sizes in zip(grid, new_grid, strict=True)
    )
    dim = table.shape[-1]
    resized = jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, table.reshape(*grid, dim), precision="highest")
    return resized.reshape(1, -1, dim)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`[B, h, w, C]` -> `[B, *size, C]`, bilinear: PyTorch's `interpolate(align_corners=False)`, no antialiasing."""
    for axis, length in enumerate(size, start=1):
        if length != x.shape[axis]:
            weights = jnp.asarray(_resampling(x.shape[axis], length, _bilinear_weight), x.dtype)
            x = jnp.einsum("Hh,bhwc->bHwc" if axis == 1 else "Ww,bhwc->bhWc", weights, x)
    return x


def _bilinear_weight(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _bicubic_weight(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic with PyTorch's a = -0.75; `jax.image.resize` has a = -0.5."""
    a, x = -0.75, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _resampling(size: int, new_size: int, weight: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Matrix `[new_size, size]` that resamples one axis; beyond the border the outermost value counts."""
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centres).astype(int) - 1
    matrix = np.zeros((new_size, size))
    for tap in range(4):
        weights = weight(np.abs(centres - (first + tap)))
        np.add.at(matrix, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), weights)
    return matrix
