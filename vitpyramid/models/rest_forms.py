"""ResT's sums that are written twice, as those of `forms`: its stem, and attention with mixed and normalised heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.forms import at_least_float32, by_device, convolution
from vitpyramid.models.token_forms import scaled_logits

Pair = tuple[int, int]
Arrays = tuple[jax.Array, ...]


def stem(x: jax.Array, kernels: Arrays, norms: tuple[Arrays, ...], of_batch: bool, dtype) -> tuple[jax.Array, tuple]:
    """Convolutions of strides 2, 1 and 2, padded by 1; batch norm (epsilon 1e-5) and ReLU behind the first and second.

    A TPU gives a map whose channels do not fill its lanes as much room and time as one whose do: there two rows and two
    columns, where a side is even, share a row of channels, by kernels that are zero where they do not meet. In bfloat16
    it takes the statistics in one pass, which is then part of the convolution: the variance is a difference of two
    sums, of what is left without the running mean. That loses digits where a batch is far from the running mean: too
    many for float32.

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
    return _stem(x, kernels, norms, of_batch, dtype, ((1, 1),) * 4)


def stem_tpu(x, kernels, norms, of_batch, dtype):
    fold = tuple(2 - -(-side // 2) % 2 for side in x.shape[1:3])
    return _stem(x, kernels, norms, of_batch, dtype, ((1, 1), fold, fold, (1, 1)), one_pass=dtype == jnp.bfloat16)


def _stem(x, kernels, norms, of_batch, dtype, folds, one_pass=False):
    """`folds`: rows and columns that share a row of channels, of each convolution's input and of the last's output."""
    x, moments = x.astype(dtype), []
    for i, (kernel, stride) in enumerate(zip(kernels, (2, 1, 2), strict=True)):
        x = folded_convolution(x, kernel, stride, folds[i], folds[i + 1])
        if i < len(norms):
            x, found = batch_norm(x, *norms[i], of_batch, one_pass, math.prod(folds[i + 1]))
            x = jax.nn.relu(x)
            moments.append(found)
    return x, tuple(moments)


def batch_norm(x, scale, shift, mean, variance, of_batch: bool, one_pass: bool, fold: int) -> tuple[jax.Array, Arrays]:
    """`x [B, h, w, fold * C]` normalised, and the mean and variance `[C]` that it was normalised by; others as `stem`.

    The running mean is what `one_pass` takes off before it sums.
    """

    def repeated(values):
        return jnp.tile(values, fold)

    def channel_mean(values):
        return values.mean((0, 1, 2)).reshape(fold, -1).mean(0)

    wide = x.astype(at_least_float32(x.dtype))
    if of_batch and one_pass:
        centred = wide - repeated(mean)
        first = channel_mean(centred)
        mean, variance = mean + first, jnp.maximum(channel_mean(jnp.square(centred)) - jnp.square(first), 0)
    elif of_batch:
        mean = channel_mean(wide)
        variance = channel_mean(jnp.square(wide - repeated(mean)))
    out = (wide - repeated(mean)) * repeated(jax.lax.rsqrt(variance + 1e-5) * scale) + repeated(shift)
    return out.astype(x.dtype), (mean, variance)


def folded_convolution(x: jax.Array, kernel: jax.Array, stride: int, fold: Pair, out_fold: Pair) -> jax.Array:
    """3 x 3 convolution padded by 1, of maps in which neighbours share a row of channels: `fold = (rows, columns)`.

    Args:
      x: `[B, H / rows, W / columns, rows * columns * C]`, channels as (row, column, c).
      kernel: `[3, 3, C, features]`.
      out_fold: of the result; its sides divide those of the map without folds.

    Returns:
      `[B, ceil(H / stride) / rows', ceil(W / stride) / columns', rows' * columns' * features]` in the dtype of `x`.
    """
    strides, pads, selections = [], [], []
    for side, inner, outer in zip(x.shape[1:3], fold, out_fold, strict=True):
        step = stride * outer // inner
        cells = -(-side * inner // stride) // outer
        # Output `outer * i + a` reads input `stride * (outer * i + a) + tap - 1`.
        first, last = -1 // inner, (stride * (outer - 1) + 1) // inner
        selection = np.zeros((last - first + 1, inner, outer, 3), np.float32)
        for a in range(outer):
            for tap in range(3):
                cell, place = divmod(stride * a + tap - 1, inner)
                selection[cell - first, place, a, tap] = 1
        strides.append(step)
        pads.append((-first, (cells - 1) * step + last + 1 - side))
        selections.append(selection)
    if fold != (1, 1) or out_fold != (1, 1):
        # Every sum has one term that is not zero.
        rows, columns = selections
        both = np.einsum("ypak,xqbl->yxpqabkl", rows, columns).reshape(-1, 9)
        channels = kernel.shape[2:]
        kernel = jnp.dot(both.astype(kernel.dtype), kernel.reshape(9, -1), precision="highest")
        shape = (len(rows), len(columns), math.prod(fold), math.prod(out_fold), *channels)
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
