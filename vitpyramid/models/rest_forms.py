"""ResT's sums that are written twice, as those of `forms`: its stem, and attention with mixed and normalised heads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.derivatives import with_backward
from vitpyramid.models.forms import at_least_float32, by_device, convolution
from vitpyramid.models.token_forms import scaled_logits

Arrays = tuple[jax.Array, ...]


class Cells(NamedTuple):
    """How one axis of a map is cut: `fold` neighbours a cell, the first of which begins at index `start`, 0 or less.

    Cells may go beyond the map, which has `size` entries.
    """

    size: int
    fold: int = 1
    start: int = 0

    @property
    def count(self) -> int:
        """Number of cells."""
        return -(-(self.size - self.start) // self.fold)

    @property
    def inside(self) -> np.ndarray:
        """True `[count, fold]` for what is of the map."""
        index = self.start + np.arange(self.count * self.fold).reshape(-1, self.fold)
        return (index >= 0) & (index < self.size)


Grid = tuple[Cells, Cells]  # rows and columns


def stem(x: jax.Array, kernels: Arrays, norms: tuple[Arrays, ...], of_batch: bool, dtype) -> tuple[jax.Array, tuple]:
    """Convolutions of strides 2, 1 and 2, padded by 1; batch norm (epsilon 1e-5) and ReLU behind the first and second.

    A TPU gives a map whose channels do not fill its lanes as much room and time as one whose do: there two rows and two
    columns, where a side is even, share a row of channels, by kernels that are zero where they do not meet. Behind the
    first convolution such cells begin one row and one column before the map: those of the second then meet two by two
    of them, not three by three. In bfloat16 it takes the statistics in one pass, which is then part of the convolution:
    the variance is a difference of two sums, of what is left without the running mean. That loses digits where a batch
    is far from the running mean: too many for float32.

    Args:
      x: `[B, H, W, C]`.
      kernels: three, `[3, 3, C_in, C_out]`.
      norms: two, of scale, shift, running mean and running variance `[C_out]`.
      of_batch: normalise by the batch's statistics, not by the running ones.

    Returns:
      `[B, ceil(H / 4), ceil(W / 4), C_out]` in `dtype`, and mean and biased variance `[C_out]` for each norm, at least
      float32.
    """
    return by_device(stem_tpu, stem_plain, x, kernels, norms, of_batch=of_batch, dtype=dtype)


def stem_plain(x, kernels, norms, of_batch, dtype):
    grids = [tuple(Cells(-(-side // scale)) for side in x.shape[1:3]) for scale in (1, 2, 2, 4)]
    return _stem(x, kernels, norms, of_batch, dtype, grids)


def stem_tpu(x, kernels, norms, of_batch, dtype, one_pass=None):
    one_pass = dtype == jnp.bfloat16 if one_pass is None else one_pass
    halves = [-(-side // 2) for side in x.shape[1:3]]
    folds = [2 - half % 2 for half in halves]
    pairs = list(zip(halves, folds, strict=True))
    grids = [
        tuple(map(Cells, x.shape[1:3])),
        tuple(Cells(half, fold, 1 - fold) for half, fold in pairs),
        tuple(Cells(half, fold) for half, fold in pairs),
        tuple(Cells(-(-half // 2)) for half in halves),
    ]
    return _stem(x, kernels, norms, of_batch, dtype, grids, one_pass)


def _stem(x, kernels, norms, of_batch, dtype, grids: list[Grid], one_pass=False):
    """`grids`: of each convolution's input and of the last's output."""
    x, moments = x.astype(dtype), []
    for i, (kernel, stride) in enumerate(zip(kernels, (2, 1, 2), strict=True)):
        x = folded_convolution(x, kernel, stride, grids[i], grids[i + 1])
        if i < len(norms):
            x, found = batch_norm(x, *norms[i], of_batch, one_pass, grids[i + 1])
            x = zero_outside(jax.nn.relu(x), grids[i + 1])
            moments.append(found)
    return x, tuple(moments)


def zero_outside(x: jax.Array, grid: Grid) -> jax.Array:
    """Cells `x` `[B, h, w, rows * columns * C]` with zeros where they go beyond the map."""
    rows, columns = grid
    if not rows.inside.all():
        x = jnp.where(np.repeat(rows.inside, x.shape[-1] // rows.fold, axis=1)[:, None], x, 0)
    if not columns.inside.all():
        channels = x.shape[-1] // (rows.fold * columns.fold)
        x = jnp.where(np.tile(np.repeat(columns.inside, channels, axis=1), rows.fold), x, 0)
    return x


def batch_norm(x, scale, shift, mean, variance, of_batch: bool, one_pass: bool, grid: Grid) -> tuple[jax.Array, Arrays]:
    """Cells `x` normalised, and the mean and variance `[C]` that they were normalised by; others as `stem`.

    The running mean is what `one_pass` takes off before it sums.
    """
    if of_batch and one_pass:
        return norm_one_pass(x, scale, shift, mean, grid=grid)
    wide = x.astype(at_least_float32(x.dtype))
    if of_batch:
        mean = _channel_mean(wide, grid)
        variance = _channel_mean(jnp.square(wide - _repeated(mean, grid)), grid)
    return _normed(wide, scale, shift, mean, jax.lax.rsqrt(variance + 1e-5), grid).astype(x.dtype), (mean, variance)


def _normed(wide, scale, shift, mean, rate, grid):
    return (wide - _repeated(mean, grid)) * _repeated(rate * scale, grid) + _repeated(shift, grid)


def _repeated(values, grid):
    return jnp.tile(values, grid[0].fold * grid[1].fold)


def _channel_sum(values, grid):
    return values.sum((0, 1, 2)).reshape(grid[0].fold * grid[1].fold, -1).sum(0)


def _channel_mean(values, grid):
    """Of what is of the map."""
    return _channel_sum(zero_outside(values, grid), grid) / (len(values) * grid[0].size * grid[1].size)


def _norm_one_pass(x, scale, shift, about, grid):
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - _repeated(about, grid)
    first = _channel_mean(centred, grid)
    mean, variance = about + first, jnp.maximum(_channel_mean(jnp.square(centred), grid) - jnp.square(first), 0)
    rate = jax.lax.rsqrt(variance + 1e-5)
    out = _normed(wide, scale, shift, mean, rate, grid).astype(x.dtype)
    return (out, (mean, variance)), (x, scale, mean, rate)


def _norm_one_pass_backward(stored, cotangents, grid):
    x, scale, mean, rate = stored
    cotangent, (of_mean, of_variance) = cotangents
    cotangent = cotangent.astype(mean.dtype)
    centred = x.astype(mean.dtype) - _repeated(mean, grid)
    of_shift, of_scale = _channel_sum(cotangent, grid), _channel_sum(cotangent * centred, grid) * rate
    n = len(x) * grid[0].size * grid[1].size
    level = (of_mean - rate * scale * of_shift) / n
    slope = (2 * of_variance - jnp.square(rate) * scale * of_scale) / n
    of_x = cotangent * _repeated(rate * scale, grid)
    of_x = of_x + zero_outside(_repeated(level, grid) + centred * _repeated(slope, grid), grid)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_shift.astype(scale.dtype), jnp.zeros_like(mean)


# `batch_norm` by the batch's statistics, by sums of differences to `about` and of their squares, in one pass. So is the
# backward pass; derived from the forward one, it has twice as many sums.
norm_one_pass = with_backward(_norm_one_pass, _norm_one_pass_backward)


def folded_convolution(x: jax.Array, kernel: jax.Array, stride: int, grid: Grid, out_grid: Grid) -> jax.Array:
    """3 x 3 convolution padded by 1, of maps in which neighbours share a row of channels.

    Args:
      x: `[B, h, w, rows * columns * C]`, the cells of `grid`, channels as (row, column, c), zero outside the map.
      kernel: `[3, 3, C, features]`.
      out_grid: of the result, whose cells are as many times `stride` as wide as those of `grid`, or a multiple.

    Returns:
      The cells of `out_grid` in the dtype of `x`. What is outside the map there is of no use.
    """
    strides, pads, selections = [], [], []
    for inner, outer in zip(grid, out_grid, strict=True):
        step = stride * outer.fold // inner.fold
        # Output `outer.fold * i + outer.start + a` reads input `stride *` that `+ tap - 1`.
        offset = stride * outer.start - 1 - inner.start
        first, last = offset // inner.fold, (offset + stride * (outer.fold - 1) + 2) // inner.fold
        selection = np.zeros((last - first + 1, inner.fold, outer.fold, 3), np.float32)
        for a in range(outer.fold):
            for tap in range(3):
                cell, place = divmod(offset + stride * a + tap, inner.fold)
                selection[cell - first, place, a, tap] = 1
        strides.append(step)
        pads.append((-first, (outer.count - 1) * step + last + 1 - inner.count))
        selections.append(selection)
    if any(cells.fold > 1 for cells in (*grid, *out_grid)):
        # Every sum has one term that is not zero.
        rows, columns = selections
        both = np.einsum("ypak,xqbl->yxpqabkl", rows, columns).reshape(-1, 9)
        channels = kernel.shape[2:]
        kernel = jnp.dot(both.astype(kernel.dtype), kernel.reshape(9, -1), precision="highest")
        folds = [cells[0].fold * cells[1].fold for cells in (grid, out_grid)]
        shape = (len(rows), len(columns), *folds, *channels)
        kernel = kernel.reshape(shape).swapaxes(3, 4).reshape(*shape[:2], x.shape[-1], -1)
    return convolution(x, kernel.astype(x.dtype), strides, pads)


def mixed_weights(query, key, mixing, bias) -> jax.Array:
    """Attention maps of `mixed_attention`, `[B, heads, N, M]`, at least float32."""
    return instance_norm(mixed_softmax(query, key, mixing, bias))


def mixed_softmax(query, key, mixing, bias) -> jax.Array:
    """The same before they are normalised: rows sum to 1."""
    logits = scaled_logits(query, key, query.shape[-1] ** -0.5)
    logits = jnp.einsum("bhnm,hg->bgnm", logits, mixing) + bias[:, None, None]
    return jax.nn.softmax(logits)


def instance_norm(x: jax.Array) -> jax.Array:
    """Each `[N, M]` map of `x` `[B, heads, N, M]` to mean 0 and variance 1; no parameters, no running statistics."""
    x = x - x.mean((2, 3), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean((2, 3), keepdims=True) + 1e-5)


def mixed_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mixing: jax.Array, bias: jax.Array
) -> jax.Array:
    """Attention whose logits are mixed across heads, and whose maps are normalised after the softmax.

    On a TPU a map of 49 columns is far more to move than to multiply. There the keys are mixed, not the maps; the mean
    of a map is known, as its rows sum to 1; and the result is divided by the deviation in its place.

    Args:
      query: `[B, N, heads, d]`.
      key, value: `[B, M, heads, d]`.
      mixing, bias: `[heads, heads]` and `[heads]`.

    Returns:
      `[B, N, heads, d]` in the dtype of `value`.
    """
    return by_device(mixed_attention_tpu, mixed_attention_plain, query, key, value, mixing, bias)


def mixed_attention_plain(query, key, value, mixing, bias):
    weights = mixed_weights(query, key, mixing, bias)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(value.dtype), value)


def mixed_attention_tpu(query, key, value, mixing, bias):
    del bias  # the same for all keys, which the softmax does not see
    (b, n, heads, d), m, wide = query.shape, key.shape[1], at_least_float32(query.dtype)
    mixed = key.astype(wide)[:, :, None] * (mixing.T * d**-0.5)[:, :, None]  # [B, M, heads', heads, d]
    mixed = mixed.reshape(b, m, heads, heads * d).astype(query.dtype)
    logits = jnp.einsum("bnc,bmhc->bhnm", query.reshape(b, n, -1), mixed, preferred_element_type=wide)
    # Centred before it is rounded: maps are often nearly flat.
    centred = jax.nn.softmax(logits) - 1 / m
    factor = jax.lax.rsqrt(jnp.square(centred).mean((2, 3)) + 1e-5)  # [B, heads]
    out = jnp.einsum("bhnm,bmhd->bnhd", centred.astype(value.dtype), value, preferred_element_type=wide)
    return (out * factor[:, None, :, None]).astype(value.dtype)
