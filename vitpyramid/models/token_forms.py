"""What blocks do to tokens, written twice as in `forms`: LayerNorm, GELU, softmax attention.

The TPU's forms have a backward pass of their own, which stores less and passes fewer times over it.
"""

import jax
import jax.numpy as jnp

from vitpyramid.models.derivatives import with_backward
from vitpyramid.models.forms import at_least_float32, by_device, written


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype) -> jax.Array:
    """LayerNorm over the last axis, statistics in at least float32.

    The variance takes two passes. In bfloat16 a TPU takes one, over `x` and its square, which the layer before it can
    do with what it has just computed. Of a row with mean `m` that loses some `2e-7 m^2` of the variance, where rounding
    its entries to bfloat16 has changed it by `1e-6 m^2`.

    Args:
      x: `[..., C]`.
      scale, bias: `[C]`.

    Returns:
      `[..., C]` in `dtype`.
    """
    tpu = layer_norm_one_pass if x.dtype == dtype == jnp.bfloat16 else layer_norm_two_passes
    return by_device(tpu, layer_norm_two_passes, x, scale, bias, epsilon=epsilon, dtype=dtype)


def _normed_by_two(x, scale, bias, epsilon, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    return ((wide - mean) * (rate * scale) + bias).astype(dtype), (x, scale, mean, rate)


def _normed_by_one(x, scale, bias, epsilon, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    rate = jax.lax.rsqrt(variance + epsilon)
    return ((wide - mean) * (rate * scale) + bias).astype(dtype), (x, scale, mean, rate)


def _normed_backward(stored, cotangent, epsilon, dtype):
    del epsilon, dtype
    x, scale, mean, rate = stored
    normed, cotangent = (x - mean) * rate, cotangent.astype(mean.dtype)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (cotangent * normed).sum(rows), cotangent.sum(rows)
    cotangent = cotangent * scale
    level, slope = (y.mean(-1, keepdims=True) for y in (cotangent, cotangent * normed))
    of_x = rate * (cotangent - level - normed * slope)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


layer_norm_two_passes = with_backward(_normed_by_two, _normed_backward)
layer_norm_one_pass = with_backward(_normed_by_one, _normed_backward)


def gelu(x: jax.Array) -> jax.Array:
    """`x Phi(x)`, the exact (erf) form, `[...]` -> `[...]`.

    In bfloat16 a TPU computes value and slope together, in float32 and rounded once, and keeps the slope for the
    backward pass, which is then one product. By itself the compiler takes `erfc`, three times as many operations, and
    keeps it beside `x`: both are read where one would do. The form has few digits left below -5, where GELU is 1e-6.
    """
    return by_device(gelu_with_slope if x.dtype == jnp.bfloat16 else gelu_erf, gelu_erf, x)


def _value_alone(x):
    # `jax.nn.gelu` takes `erfc`, whose two polynomials cost a CPU as much as a quarter of the products around it.
    wide = x.astype(at_least_float32(x.dtype))
    return (wide * _share(wide)).astype(x.dtype), x


def _share(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _slope(x):
    return _share(x) + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5


def _gelu_erf_backward(x, cotangent):
    wide = written(x).astype(at_least_float32(x.dtype))  # or `erf` would be stored beside `x`
    return (written((cotangent * _slope(wide)).astype(x.dtype)),)


gelu_erf = with_backward(_value_alone, _gelu_erf_backward)


def _value_and_slope(x):
    wide = x.astype(at_least_float32(x.dtype))
    # Without the barrier the slope is computed in the backward pass, from `x`.
    return jax.lax.optimization_barrier(((wide * _share(wide)).astype(x.dtype), _slope(wide).astype(x.dtype)))


gelu_with_slope = with_backward(_value_and_slope, lambda slope, cotangent: (cotangent * slope,))


def attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """`softmax(scale * query key^T) value` for each head, the softmax in at least float32.

    The backward pass computes the weights `[N, M]` again: on a CPU to store them takes longer. What is divided by their
    sums has `d` columns, not `M`. A TPU spends most of it on moving weights, not on products. Its form keeps them for
    the backward pass once, in the dtype of `value` in which they were multiplied, and takes the sums that the softmax's
    gradient needs over `d` instead of over keys.

    Args:
      query: `[B, N, heads, d]`.
      key, value: `[B, M, heads, d]`.

    Returns:
      `[B, N, heads, d]` in the dtype of `value`.
    """
    return by_device(attention_tpu, attention_in_pieces, query, key, value, scale=scale)


def attention_weights(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """The attention map, `[B, heads, N, M]`, at least float32."""
    return jax.nn.softmax(scaled_logits(query, key, scale))


def scaled_logits(query, key, scale) -> jax.Array:
    """`scale * query key^T` for each head, `[B, heads, N, M]`, at least float32."""
    return jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=at_least_float32(query.dtype)) * scale


def attention_in_pieces(query, key, value, scale, entries=2**22):
    """`attention_products` of up to eight pieces of the queries, for maps of more than `entries`.

    XLA on CPU writes several arrays of a map's size. Above 32 MiB each is memory new from the system, and to get that
    takes longer than to fill it.
    """
    (b, n, heads, _), m = query.shape, key.shape[1]
    images = b if isinstance(b, int) else 1  # their number may be left open, for export
    rows = -(-n // min(8, -(-images * heads * n * m // entries)))
    pieces = [attention_products(query[:, i : i + rows], key, value, scale=scale) for i in range(0, n, rows)]
    return jnp.concatenate(pieces, axis=1)


def _attended_by_heads(query, key, value, scale):
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, heads, N, d]
    logits = _head_logits(query, key, scale)
    largest = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = powers.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bhmd->bhnd", powers.astype(value.dtype), value, preferred_element_type=logits.dtype)
    out = (out / total).astype(value.dtype)
    return out.swapaxes(1, 2), (query, key, value, out, largest, total)


def _head_logits(query, key, scale):
    wide = at_least_float32(query.dtype)
    if query.dtype == wide:  # XLA on CPU would write a whole map of `scale` to multiply the logits by
        return jnp.einsum("bhnd,bhmd->bhnm", query * scale, key)
    return jnp.einsum("bhnd,bhmd->bhnm", query, key, preferred_element_type=wide) * scale


def _attended_by_heads_backward(stored, cotangent, scale):
    query, key, value, out, largest, total = stored
    wide, dtype = total.dtype, value.dtype
    cotangent = cotangent.swapaxes(1, 2).astype(wide) / total
    level = (cotangent * out).sum(-1, keepdims=True)
    cotangent = cotangent.astype(dtype)
    powers = jnp.exp(_head_logits(query, key, scale) - largest)
    of_logits = powers * (jnp.einsum("bhnd,bhmd->bhnm", cotangent, value, preferred_element_type=wide) - level)
    of_logits = of_logits.astype(dtype)
    of_query = jnp.einsum("bhnm,bhmd->bhnd", of_logits, key) * scale
    # The transposed operand is the small one.
    of_key = jnp.einsum("bhdn,bhnm->bhdm", query.swapaxes(2, 3) * scale, of_logits)
    of_value = jnp.einsum("bhdn,bhnm->bhdm", cotangent.swapaxes(2, 3), powers.astype(dtype))
    return of_query.swapaxes(1, 2), of_key.transpose(0, 3, 1, 2), of_value.transpose(0, 3, 1, 2)


attention_products = with_backward(_attended_by_heads, _attended_by_heads_backward)


def _attended(query, key, value, scale):
    logits = scaled_logits(query, key, scale)
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    # Without the barrier the logits are written, in float32, and read again for the weights.
    powers, total = jax.lax.optimization_barrier((powers.astype(value.dtype), powers.sum(-1)))
    out = jnp.einsum("bhnm,bmhd->bnhd", powers, value, preferred_element_type=total.dtype)
    share = 1 / total.swapaxes(1, 2)[..., None]  # [B, N, heads, 1]
    out = (out * share).astype(value.dtype)
    return out, (query, key, value, powers, share, out)


def _attended_backward(stored, cotangent, scale):
    query, key, value, powers, share, out = stored
    wide = at_least_float32(query.dtype)
    # Of each row of weights times their cotangents, without a pass over those.
    level = (cotangent.astype(wide) * out).sum(-1, keepdims=True)
    of_value = jnp.einsum("bhnm,bnhd->bmhd", powers, (cotangent * share).astype(value.dtype))
    of_weights = jnp.einsum("bnhd,bmhd->bhnm", cotangent, value, preferred_element_type=wide)
    level, share = (column.swapaxes(1, 2) for column in (level, share * scale))
    of_logits = (powers * (of_weights - level) * share).astype(query.dtype)
    of_query = jnp.einsum("bhnm,bmhd->bnhd", of_logits, key)
    of_key = jnp.einsum("bhnm,bnhd->bmhd", of_logits, query)
    return of_query, of_key, of_value


attention_tpu = with_backward(_attended, _attended_backward)


def random_features(u: jax.Array, w: jax.Array) -> jax.Array:
    """`w u - |u|^2 / 2`, what the performer takes the exponential of, in at least float32.

    A TPU makes six products of bfloat16 of one of float32, each of 32 columns where it has room for 128. Where `u` is
    bfloat16, three parts of `w` beside each other give the same digits in one.

    Args:
      u: `[B, N, e]`.
      w: `[m, e]`.

    Returns:
      `[B, N, m]`.
    """
    tpu = random_features_by_parts if u.dtype == jnp.bfloat16 else random_features_product
    return by_device(tpu, random_features_product, u, w)


def random_features_product(u, w):
    u = u.astype(at_least_float32(u.dtype))
    # The highest precision: on accelerators a float32 product may otherwise be one of bfloat16.
    wu = jnp.einsum("bne,me->bnm", u, w.astype(u.dtype), precision="highest")
    return wu - jnp.sum(u * u, axis=-1, keepdims=True) / 2


def _features_by_parts(u, w):
    wide = at_least_float32(w.dtype)
    rest, parts = w.astype(wide), []
    for _ in range(2):
        # By a conversion and one back, the compiler would leave the rounding out.
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    parts = jnp.concatenate([*parts, rest]).astype(u.dtype)
    products = jnp.split(jnp.einsum("bne,me->bnm", u, parts, preferred_element_type=wide), 3, axis=-1)
    return sum(products) - jnp.sum(jnp.square(u.astype(wide)), axis=-1, keepdims=True) / 2, (u, w)


def _random_features_backward(stored, cotangent):
    u, w = stored
    rounded, wide = cotangent.astype(u.dtype), cotangent.dtype
    of_u = jnp.einsum("bnm,me->bne", rounded, w.astype(u.dtype), preferred_element_type=wide)
    of_u = of_u - u * cotangent.sum(-1, keepdims=True)
    of_w = jnp.einsum("bnm,bne->me", rounded, u, preferred_element_type=wide)
    return of_u.astype(u.dtype), of_w.astype(w.dtype)


random_features_by_parts = with_backward(_features_by_parts, _random_features_backward)
