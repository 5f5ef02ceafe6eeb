"""Sums that are written twice: once as a TPU computes them best, once for all other devices.

Which form is compiled follows from the device that a program is lowered for; the other is dropped before the compiler
sees it. The `_tpu` functions can be called anywhere: tests compare them. benchmarks/tpu.md has what each one saves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.derivatives import with_backward

convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def at_least_float32(dtype):
    """`dtype` promoted to float32 if it is narrower: the dtype of softmax, statistics, logits and losses."""
    return jnp.promote_types(dtype, jnp.float32)


def by_device(tpu, default, *arrays, **options):
    """`tpu` where the program is lowered for one, else `default`; both are traced once for all arrays of one shape."""
    if tpu is default:
        return default(*arrays, **options)
    return _either(tpu, default, tuple(sorted(options.items())))(*arrays)


@functools.cache
def _either(tpu, default, options):
    forms = [functools.partial(form, **dict(options)) for form in (tpu, default)]

    def either(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=forms[0], default=forms[1])

    # A jitted function is what JAX keeps the program and the derivatives of.
    return jax.jit(either, inline=True)


@functools.partial(jax.jit, inline=True)
def written(x: jax.Array) -> jax.Array:
    """`x` itself, which a CPU writes to memory here, as it does its cotangent.

    Otherwise XLA on CPU computes a sum again in each of its readers: that of a residual stream's cotangents, in every
    block, from all blocks behind it.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, `[..., C]` and `[C, F]` -> `[..., F]`.

    The gradient of the kernel sums over all rows. XLA on CPU does so at once over one axis; for two it first writes the
    cotangent, transposed.
    """
    return by_device(jnp.dot, product_of_rows, x, kernel)


def product_of_rows(x, kernel):
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def dense_product(x: jax.Array, kernel: jax.Array, dimensions, precision=None) -> jax.Array:
    """`product` as `flax.linen.Dense` calls it, always over the last axis of `x`."""
    del dimensions, precision
    return product(x, kernel)


def widening_convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """Grouped 3 x 3 convolution of stride 2, padded by 1; each input channel makes `features / C` outputs.

    Nine shifted products: XLA on CPU takes seconds for the gradient of a grouped convolution with several outputs a
    group, a hundred times as long. On a TPU they do not reach the matrix unit; a dense convolution whose kernel is zero
    between groups does, and its C times as many multiplications cost less.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[3, 3, 1, features]`, group-major.
      bias: `[features]`.

    Returns:
      `[B, ceil(h / 2), ceil(w / 2), features]` in `dtype`.
    """
    return by_device(widening_convolution_tpu, widening_products, x, kernel, bias, dtype=dtype)


def widening_products(x, kernel, bias, dtype):
    b, height, width, dim = x.shape
    h, w = -(-height // 2), -(-width // 2)
    # The sum of nine products is kept in at least float32, as a convolution keeps it.
    x, kernel, bias = (array.astype(at_least_float32(dtype)) for array in (x, kernel, bias))
    kernel = kernel.reshape(3, 3, dim, -1)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[..., None]
    out = bias.reshape(dim, -1)
    for i in range(3):
        for j in range(3):
            out = out + x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] * kernel[i, j]
    return out.reshape(b, h, w, -1).astype(dtype)


def widening_convolution_tpu(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    dim, features = x.shape[-1], kernel.shape[-1]
    group = jnp.arange(features) // (features // dim)
    kernel = jnp.where(group == jnp.arange(dim)[:, None], kernel, 0)  # [3, 3, C, features]
    return convolve(x, kernel, (2, 2), [(1, 1)] * 2) + bias


def convolution(x: jax.Array, kernel: jax.Array, strides: tuple, pads: tuple) -> jax.Array:
    """`[B, H, W, C]` and `[p, q, C, features]` -> `[B, h, w, features]`, padded or cut by `pads`.

    The gradient of the kernel is one matrix product for each of its places: XLA on CPU takes a convolution with windows
    as large as the map, on one core.
    """
    options = {"window_strides": tuple(strides), "padding": tuple(map(tuple, pads))}
    cpu, default = (functools.partial(form, **options) for form in (convolution_of_places, convolve))
    return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _convolution(x, kernel, window_strides, padding):
    return convolve(x, kernel, window_strides, padding), (x, kernel)


def _convolution_backward(stored, cotangent, window_strides, padding):
    x, kernel = stored
    _, backward = jax.vjp(lambda x: convolve(x, kernel, window_strides, padding), x)
    (rows, columns), (_, h, w, features) = window_strides, cotangent.shape
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in ((0, 0), *padding, (0, 0))])
    of_rows = cotangent.reshape(-1, features)

    def place(i, j):
        window = padded[:, i : i + rows * (h - 1) + 1 : rows, j : j + columns * (w - 1) + 1 : columns]
        return window.reshape(len(of_rows), -1).T @ of_rows

    places = [place(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return *backward(cotangent), jnp.stack(places).reshape(kernel.shape)


convolution_of_places = with_backward(_convolution, _convolution_backward)


def depthwise_convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """Depthwise 3 x 3 convolution of stride 1, padded by 1.

    Nine shifted products: on CPU they take a tenth of the convolution's time, which is computed channel by channel. On
    a TPU the convolution is fast.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[3, 3, 1, C]`.
      bias: `[C]`.

    Returns:
      `[B, h, w, C]` in `dtype`.
    """
    return by_device(depthwise_convolution_tpu, shifted_products, x, kernel, bias, dtype=dtype)


def shifted_products(x, kernel, bias, dtype):
    (_, h, w, _), wide = x.shape, at_least_float32(dtype)
    x = jnp.pad(written(x.astype(dtype)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, out = kernel.astype(dtype).astype(wide), bias.astype(dtype).astype(wide)
    for i in range(3):
        for j in range(3):
            out = out + x[:, i : i + h, j : j + w] * kernel[i, j, 0]
    return written(out.astype(dtype))


def depthwise_convolution_tpu(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    return convolve(x, kernel, (1, 1), [(1, 1)] * 2, feature_group_count=x.shape[-1]) + bias


def reducing_convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """Depthwise convolution, kernel `sr + 1`, stride `sr` (even), padding `sr // 2`.

    Element by element, on windows that share one row and one column with the next: on CPU its gradient takes a
    hundredth of the time of the strided convolution's. A TPU copies the windows, and has a fast depthwise convolution.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[sr + 1, sr + 1, 1, C]`.
      bias: `[C]`.

    Returns:
      `[B, ceil(h / sr), ceil(w / sr), C]` in `dtype`.
    """
    return by_device(reducing_convolution_tpu, reducing_products, x, kernel, bias, dtype=dtype)


def reducing_products(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    sr, (b, height, width, c) = kernel.shape[0] - 1, x.shape
    h, w = -(-height // sr), -(-width // sr)
    before = sr // 2
    pad = [(before, (cells + 1) * sr - before - side) for cells, side in ((h, height), (w, width))]
    x = jnp.pad(x, [(0, 0), *pad, (0, 0)]).reshape(b, h + 1, sr, w + 1, sr, c)
    x = jnp.concatenate([x[:, :h], x[:, 1:, :1]], axis=2)
    x = jnp.concatenate([x[:, :, :, :w], x[:, :, :, 1:, :1]], axis=4)  # [B, h', sr + 1, w', sr + 1, C]
    x = (x * kernel[:, None, :, 0]).sum((2, 4), dtype=at_least_float32(dtype))
    return x.astype(dtype) + bias


def reducing_convolution_tpu(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    sr = kernel.shape[0] - 1
    return convolve(x, kernel, (sr, sr), [(sr // 2, sr // 2)] * 2, feature_group_count=x.shape[-1]) + bias


def patch_product(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """Convolution whose kernel equals its stride, without padding: patches do not overlap.

    A reshape and one matrix product: on CPU the gradient of PVT's 8 x 8 reduction takes less than a third of the
    strided convolution's time, the others are level (benchmarks/README.md). On a TPU that is best for large patches,
    whose rows fill its lanes; for small ones the reshape moves more than the product costs.

    Args:
      x: `[B, H, W, C_in]`. Rows and columns that do not fill a patch are dropped, as VALID padding does.
      kernel: `[p, p, C_in, C_out]`.
      bias: `[C_out]`.

    Returns:
      `[B, H // p, W // p, C_out]` in `dtype`.
    """
    if kernel.shape[0] <= 4:
        tpu = patch_convolution_tpu
    else:
        tpu = patch_rows_tpu if kernel.shape[2] >= 16 else patch_matrix_product
    return by_device(tpu, patch_matrix_product, x, kernel, bias, dtype=dtype)


def patch_matrix_product(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    (p, _, c, features), (b, height, width, _) = kernel.shape, x.shape
    h, w = height // p, width // p
    x = x[:, : h * p, : w * p].reshape(b, h, p, w, p, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, p * p * c)
    return product(x, kernel.reshape(p * p * c, features)) + bias


def patch_convolution_tpu(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    return convolve(x, kernel, kernel.shape[:2], "VALID") + bias


def patch_rows_tpu(x, kernel, bias, dtype):
    x, kernel, bias = (array.astype(dtype) for array in (x, kernel, bias))
    (p, _, c, features), (b, height, width, _) = kernel.shape, x.shape
    x = x[:, :, : width // p * p].reshape(b, height, width // p, p * c)
    return convolve(x, kernel.reshape(p, 1, p * c, features), (p, 1), "VALID") + bias


def patch_embedding(x: jax.Array, kernel: jax.Array, strides: tuple, padding, **options) -> jax.Array:
    """Convolution of overlapping patches, `strides` a divisor of the kernel's sides, as `flax.linen.Conv` calls it.

    A CPU takes one product of all cells of `strides` with every part of the kernel, and adds what meets: a third of the
    time of the convolution and its gradient, which XLA computes on one core.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[p, p, C, features]`.
      padding: "VALID", all that is known here.
      options: those of a plain convolution.

    Returns:
      `[B, (H - p) // stride + 1, (W - p) // stride + 1, features]`.
    """
    form = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    cells = functools.partial(product_of_cells, stride=strides[0])
    return jax.lax.platform_dependent(x, kernel, cpu=cells, default=form)


def product_of_cells(x, kernel, stride):
    (b, height, width, c), (p, _, _, features) = x.shape, kernel.shape
    h, w, parts = (height - p) // stride + 1, (width - p) // stride + 1, p // stride
    rows, columns = h + parts - 1, w + parts - 1
    x = x[:, : rows * stride, : columns * stride].reshape(b, rows, stride, columns, stride, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1)
    kernel = kernel.reshape(parts, stride, parts, stride, c, features)
    products = product(x, kernel.transpose(1, 3, 4, 0, 2, 5).reshape(stride * stride * c, -1))
    products = products.reshape(b, rows, columns, parts, parts, features)
    return sum(products[:, i : i + h, j : j + w, i, j] for i in range(parts) for j in range(parts))


def packed_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, heads: int, parts: int, dtype):
    """Several linear layers into heads, their weights beside each other: `[part 0 | part 1 | ...]`, each head-major.

    One product, cut afterwards. A TPU has to copy the parts out of it, in both directions; it takes one product a part.

    Args:
      x: `[B, N, C]`.
      kernel: `[C, parts * heads * d]`.
      bias: `[parts * heads * d]` or None.

    Returns:
      `parts` arrays `[B, N, heads, d]` in `dtype`.
    """
    return by_device(separate_products_tpu, packed_product, x, kernel, bias, heads=heads, parts=parts, dtype=dtype)


def packed_product(x, kernel, bias, heads, parts, dtype):
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    packed = product(x, kernel) if bias is None else product(x, kernel) + bias.astype(dtype)
    return tuple(jnp.moveaxis(packed.reshape(*x.shape[:2], parts, heads, -1), 2, 0))


def separate_products_tpu(x, kernel, bias, heads, parts, dtype):
    kernels = jnp.split(kernel, parts, axis=1)
    biases = [None] * parts if bias is None else jnp.split(bias, parts)
    pairs = zip(kernels, biases, strict=True)
    return tuple(packed_product(x, kernel, bias, heads, 1, dtype)[0] for kernel, bias in pairs)


def split_grid(sides: tuple[int, int], window: int, stride: int, padding: int) -> tuple[int, int]:
    """Grid `(h, w)` of the windows of a map with sides `(H, W)`."""
    h, w = ((side + 2 * padding - window) // stride + 1 for side in sides)
    return h, w


def soft_split(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """Overlapping windows of a zero-padded map, `[B, H, W, C]` -> `[B, h, w, window * window * C]`, as (kx, ky, c)."""
    h, w = split_grid(x.shape[1:3], window, stride, padding)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = [x[:, ky : ky + (h - 1) * stride + 1 : stride] for ky in range(window)]
    x = jnp.concatenate(rows, axis=-1)  # [B, h, W + 2 * padding, (ky, c)]
    columns = [x[:, :, kx : kx + (w - 1) * stride + 1 : stride] for kx in range(window)]
    return jnp.concatenate(columns, axis=-1)  # [B, h, w, (kx, ky, c)]


def split_order(parameter: jax.Array, window: int) -> jax.Array:
    """First axis of a parameter, from PyTorch's order (c, ky, kx) to that of `soft_split` (kx, ky, c)."""
    windows = parameter.reshape(-1, window, window, *parameter.shape[1:])
    return jnp.swapaxes(windows, 0, 2).reshape(parameter.shape)


def split_norm_linear(x: jax.Array, scale, shift, kernel, bias, split: tuple[int, int, int], dtype) -> jax.Array:
    """Soft split, LayerNorm (epsilon 1e-5) of each window, and a dense layer; parameters are in PyTorch's order.

    In bfloat16 a TPU takes one convolution of the map, whose kernel has the norm's scale in it, and the norm's
    statistics by sums over windows: the windows, many times the map, are never written. The variance is then a
    difference of two sums, which loses digits where a window is nearly flat: too many for float32.

    Args:
      x: `[B, H, W, C]`.
      scale, shift: of the norm, `[window * window * C]`.
      kernel: `[window * window * C, features]`.
      bias: `[features]` or None.
      split: window, stride and padding.

    Returns:
      `[B, h * w, features]` in `dtype`.
    """
    tpu = split_norm_convolution_tpu if dtype == jnp.bfloat16 else split_norm_product
    return by_device(tpu, split_norm_product, x, scale, shift, kernel, bias, split=split, dtype=dtype)


def split_norm_product(x, scale, shift, kernel, bias, split, dtype):
    window = split[0]
    x = soft_split(x, *split).reshape(x.shape[0], -1, len(kernel))
    wide = x.astype(at_least_float32(dtype))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    x = (x * split_order(scale, window) + split_order(shift, window)).astype(dtype)
    x = product(x, split_order(kernel.astype(dtype), window))
    return x if bias is None else x + bias.astype(dtype)


def split_norm_convolution_tpu(x, scale, shift, kernel, bias, split, dtype):
    window, stride, padding = split
    x, wide, (depth, features) = x.astype(dtype), at_least_float32(dtype), kernel.shape
    # What the mean is multiplied by must be the sum of the kernel that the convolution has: the rounded one.
    scaled = (scale[:, None] * kernel).astype(dtype)
    windows = scaled.reshape(-1, window, window, features).transpose(1, 2, 0, 3)  # [ky, kx, c, features]
    strides, pads = (stride, stride), [(padding, padding)] * 2
    product = convolve(x, windows, strides, pads, preferred_element_type=wide)

    def window_mean(values):
        zero, shape = np.zeros((), wide), (1, window, window, 1)
        sums = values.sum(-1, keepdims=True)
        return jax.lax.reduce_window(sums, zero, jax.lax.add, shape, (1, *strides, 1), [(0, 0), *pads, (0, 0)]) / depth

    x = x.astype(wide)
    mean = window_mean(x)
    variance = jnp.maximum(window_mean(jnp.square(x)) - jnp.square(mean), 0)
    product = (product - mean * scaled.astype(wide).sum(0)) * jax.lax.rsqrt(variance + 1e-5)
    constant = jnp.dot(shift, kernel, precision="highest")
    product = product + (constant if bias is None else constant + bias)
    return product.reshape(x.shape[0], -1, features).astype(dtype)
