"""Layers that the families share: initialisers, patch convolution, MLP, drop path, position tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# Mesh axes over which the batch is split. Parameters may be split over some of them as well.
BATCH_AXES = ("data", "fsdp")

# timm's trunc_normal_(std=.02) cuts at -2 and 2, a hundred standard deviations: a plain normal.
normal_init = nn.initializers.normal(0.02)
# PyTorch's default for weights of Linear and Conv: uniform in +-1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int):
    """PyTorch's default for biases of Linear and Conv: uniform in +-1 / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


def at_least_float32(dtype):
    """`dtype` promoted to float32 if it is narrower: the dtype of softmax, statistics, logits and losses."""
    return jnp.promote_types(dtype, jnp.float32)


def shard_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis of `x` split over the mesh's batch axes and the others whole; no mesh, no effect.

    Without this at block boundaries the compiler shards activations over features when parameters are sharded,
    which costs a gather of the whole batch in every block.
    """
    axes = tuple(axis for axis in BATCH_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def linear(features: int, dtype, name: str, use_bias: bool = True, torch_init_from: int | None = None) -> nn.Dense:
    """Dense layer: normal weights and zero bias, or PyTorch's default where `torch_init_from` gives the input width."""
    if torch_init_from is None:
        return nn.Dense(features, use_bias, dtype, kernel_init=normal_init, name=name)
    bias_init = torch_bias_init(torch_init_from)
    return nn.Dense(features, use_bias, dtype, kernel_init=torch_kernel_init, bias_init=bias_init, name=name)


def layer_norm(epsilon: float, dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over channels. Statistics in at least float32 and in two passes (the fast form loses digits)."""
    return nn.LayerNorm(epsilon, dtype, use_fast_variance=False, name=name)


class PatchConv(nn.Module):
    """Convolution whose kernel equals its stride, without padding: patches do not overlap.

    Computed as a reshape and one matrix product, which is the same sum: on CPU the gradient of PVT's 8 x 8 reduction
    takes less than a third of the strided convolution's time, the others are level (benchmarks/README.md). Rows and
    columns that do not fill a patch are dropped, as VALID padding does.
    Parameters are those of the convolution: `kernel [p, p, C_in, C_out]`, `bias [C_out]`, initialised as PyTorch does.
    """

    features: int
    patch: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H // p, W // p, C_out]`."""
        p, (b, height, width, c) = self.patch, x.shape
        h, w = height // p, width // p
        kernel = self.param("kernel", torch_kernel_init, (p, p, c, self.features))
        bias = self.param("bias", torch_bias_init(p * p * c), (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = x[:, : h * p, : w * p].reshape(b, h, p, w, p, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, p * p * c)
        return x @ kernel.reshape(p * p * c, self.features) + bias


class Mlp(nn.Module):
    """`fc1 -> GELU -> fc2`, with dropout after both. GELU is the exact (erf) form.

    Attributes:
      hidden: width between the layers.
      torch_init: initialise as PyTorch does instead of with normal weights and zero biases.
    """

    hidden: int
    drop_rate: float = 0.0
    torch_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]`."""
        dim = x.shape[-1]
        x = linear(self.hidden, self.dtype, "fc1", torch_init_from=dim if self.torch_init else None)(x)
        x = nn.gelu(x, approximate=False)
        x = nn.Dropout(self.drop_rate, deterministic=False)(x)
        x = linear(dim, self.dtype, "fc2", torch_init_from=self.hidden if self.torch_init else None)(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


class DropPath(nn.Module):
    """Stochastic depth: drops the whole branch of a sample with probability `rate`, scales the kept ones."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, ...]` -> `[B, ...]`."""
        if isinstance(self.rate, float) and self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1.0 - self.rate), 0).astype(x.dtype)


def resize_positions(table: jax.Array, grid: tuple[int, int], new_grid: tuple[int, int], method: str) -> jax.Array:
    """Position table of one grid, resampled for another. Torch's `interpolate(align_corners=False)`, no antialiasing.

    Args:
      table: `[1, h * w, C]`, row-major over `grid = (h, w)`.
      new_grid: `(h', w')`.
      method: of `jax.image.resize`.

    Returns:
      `[1, h' * w', C]`; `table` itself where the grids agree.
    """
    if grid == new_grid:
        return table
    dim = table.shape[-1]
    resized = jax.image.resize(table.reshape(1, *grid, dim), (1, *new_grid, dim), method, antialias=False)
    return resized.reshape(1, -1, dim)
