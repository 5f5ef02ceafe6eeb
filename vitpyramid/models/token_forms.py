"""What blocks do to tokens, written twice as in `forms`: LayerNorm, GELU, MLP, softmax attention.

The TPU's forms have a backward pass of their own, which stores less and passes fewer times over it.
"""

import functools

import jax
import jax.numpy as jnp

from vitpyramid.models.forms import at_least_float32, by_device

Linear = tuple[jax.Array, jax.Array]  # kernel and bias
PIECE = 2**19  # values of an image between an MLP's layers: 64 MiB of 64 images in bfloat16; a v5e has 128


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype) -> jax.Array:
    """LayerNorm over the last axis, statistics in at least float32.

    The variance takes two passes. In bfloat16 a TPU takes one, in both directions, over differences to the row's first
    entry: with `n` entries that loses at most `n` roundings of float32, wherever the row lies (the sums of `x` and of
    its square lose any number).

    Args:
      x: `[..., C]`.
      scale, bias: `[C]`.

    Returns:
      `[..., C]` in `dtype`.
    """
    tpu = layer_norm_one_pass if dtype == jnp.bfloat16 else layer_norm_two_passes
    return by_device(tpu, layer_norm_two_passes, x, scale, bias, epsilon=epsilon, dtype=dtype)


def layer_norm_two_passes(x, scale, bias, epsilon, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return ((wide - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + bias).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm_one_pass(x, scale, bias, epsilon, dtype):
    return _normed(x, scale, bias, epsilon, dtype)[0]


def _normed(x, scale, bias, epsilon, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    first = wide[..., :1]
    difference = wide - first
    mean = difference.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(difference).mean(-1, keepdims=True) - jnp.square(mean), 0)
    mean, rate = mean + first, jax.lax.rsqrt(variance + epsilon)
    return ((wide - mean) * (rate * scale) + bias).astype(dtype), (x, scale, mean, rate)


def _normed_backward(epsilon, dtype, stored, cotangent):
    x, scale, mean, rate = stored
    normed, cotangent = (x - mean) * rate, cotangent.astype(mean.dtype)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = (cotangent * normed).sum(rows), cotangent.sum(rows)
    cotangent = cotangent * scale
    level, slope = (y.mean(-1, keepdims=True) for y in (cotangent, cotangent * normed))
    of_x = rate * (cotangent - level - normed * slope)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


layer_norm_one_pass.defvjp(_normed, _normed_backward)


def gelu(x: jax.Array) -> jax.Array:
    """`x Phi(x)`, the exact (erf) form, `[...]` -> `[...]`.

    In bfloat16 a TPU computes value and slope together, in float32 and rounded once, and keeps the slope for the
    backward pass, which is then one product. By itself the compiler takes `erfc`, three times as many operations, and
    keeps it beside `x`: both are read where one would do. The form has few digits left below -5, where GELU is 1e-6.
    """
    return by_device(gelu_with_slope if x.dtype == jnp.bfloat16 else gelu_erfc, gelu_erfc, x)


def gelu_erfc(x):
    return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def gelu_with_slope(x):
    return _stored_slope(x)[0]


def _stored_slope(x):
    # Without the barrier the slope is computed in the backward pass, from `x`.
    return jax.lax.optimization_barrier(_value_and_slope(x))


def _value_and_slope(x):
    wide = x.astype(at_least_float32(x.dtype))
    share = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)
    slope = share + wide * jnp.exp(-0.5 * jnp.square(wide)) * (2 * jnp.pi) ** -0.5
    return (wide * share).astype(x.dtype), slope.astype(x.dtype)


gelu_with_slope.defvjp(_stored_slope, lambda slope, cotangent: (cotangent * slope,))


def mlp(x: jax.Array, fc1: Linear, fc2: Linear, pieces: int) -> jax.Array:
    """`fc2(gelu(fc1(x)))`.

    What a TPU spends on it is moving the array between the layers. It takes some tokens after others, so that their
    part of the array stays on the chip, and computes it again in the backward pass instead of storing it.

    Args:
      x: `[B, N, C]`.
      fc1, fc2: kernel `[C, D]` and bias `[D]`, kernel `[D, C]` and bias `[C]`.
      pieces: as `mlp_pieces`.

    Returns:
      `[B, N, C]` in the dtype of `x`.
    """
    return by_device(mlp_in_pieces, mlp_at_once, x, fc1, fc2, pieces=pieces)


def mlp_pieces(tokens: int, hidden: int) -> int:
    """Into how many equal pieces of whole tiles tokens are cut so that `PIECE` holds; 1 if there is no such number."""
    least = -(-tokens * hidden // PIECE)
    return next((pieces for pieces in range(least, 2 * least) if tokens % (8 * pieces) == 0), 1)


def linear(x, kernel, bias):
    return jnp.dot(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def mlp_at_once(x, fc1, fc2, pieces):
    return linear(gelu_erfc(linear(x, *fc1)), *fc2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mlp_in_pieces(x, fc1, fc2, pieces):
    fc1, fc2 = _cast((fc1, fc2), x.dtype)

    def turn(i, out):
        return _put(out, linear(_value_and_slope(linear(_take(x, i, pieces), *fc1))[0], *fc2), i)

    return jax.lax.fori_loop(0, pieces, turn, jax.lax.empty(x.shape, x.dtype))


def _cast(arrays, dtype):
    return jax.tree.map(lambda array: array.astype(dtype), arrays)


def _take(x, i, pieces):
    """Piece `i` of `[B, N, C]`."""
    size = x.shape[1] // pieces
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _put(x, piece, i):
    return jax.lax.dynamic_update_slice_in_dim(x, piece, i * piece.shape[1], axis=1)


def _mlp_backward(pieces, stored, cotangent):
    x, *params = stored
    (fc1, fc2), wide = _cast(params, x.dtype), at_least_float32(x.dtype)

    def turn(i, carry):
        of_x, sums = carry
        tokens, of_out = _take(x, i, pieces), _take(cotangent, i, pieces)
        hidden, slope = _value_and_slope(linear(tokens, *fc1))
        of_hidden = jnp.einsum("bnc,dc->bnd", of_out, fc2[0]) * slope
        products = [
            jnp.einsum("bnc,bnd->cd", *pair, preferred_element_type=wide)
            for pair in ((tokens, of_hidden), (hidden, of_out))
        ]
        biases = [of.sum((0, 1), dtype=wide) for of in (of_hidden, of_out)]
        sums = jax.tree.map(jnp.add, sums, tuple(zip(products, biases, strict=True)))
        return _put(of_x, jnp.einsum("bnd,cd->bnc", of_hidden, fc1[0]), i), sums

    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, wide), (fc1, fc2))
    of_x, sums = jax.lax.fori_loop(0, pieces, turn, (jax.lax.empty(x.shape, x.dtype), zeros))
    return of_x, *jax.tree.map(lambda of, array: of.astype(array.dtype), sums, tuple(params))


mlp_in_pieces.defvjp(lambda x, fc1, fc2, pieces: (mlp_in_pieces(x, fc1, fc2, pieces), (x, fc1, fc2)), _mlp_backward)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    """`softmax(scale * query key^T) value` for each head, the softmax in at least float32.

    A TPU spends most of it on moving weights `[N, M]`, not on products. Its form keeps them for the backward pass once,
    in the dtype of `value` in which they were multiplied, and takes the sums that the softmax's gradient needs over
    `d` instead of over keys.

    Args:
      query: `[B, N, heads, d]`.
      key, value: `[B, M, heads, d]`.

    Returns:
      `[B, N, heads, d]` in the dtype of `value`.
    """
    return by_device(attention_tpu, attention_products, query, key, value, scale=scale)


def attention_weights(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """The attention map, `[B, heads, N, M]`, at least float32."""
    return jax.nn.softmax(scaled_logits(query, key, scale))


def scaled_logits(query, key, scale) -> jax.Array:
    """`scale * query key^T` for each head, `[B, heads, N, M]`, at least float32."""
    return jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=at_least_float32(query.dtype)) * scale


def attention_products(query, key, value, scale):
    weights = attention_weights(query, key, scale)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(value.dtype), value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention_tpu(query, key, value, scale):
    return _attended(query, key, value, scale)[0]


def _attended(query, key, value, scale):
    weights = attention_weights(query, key, scale).astype(value.dtype)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, value)
    return out, (query, key, value, weights, out)


def _attended_backward(scale, stored, cotangent):
    query, key, value, weights, out = stored
    wide = at_least_float32(query.dtype)
    # Of each row of weights times their cotangents, without a pass over those.
    level = (cotangent.astype(wide) * out).sum(-1).swapaxes(1, 2)[..., None]
    of_value = jnp.einsum("bhnm,bnhd->bmhd", weights, cotangent)
    of_weights = jnp.einsum("bnhd,bmhd->bhnm", cotangent, value, preferred_element_type=wide)
    of_logits = (weights * (of_weights - level) * scale).astype(query.dtype)
    of_query = jnp.einsum("bhnm,bmhd->bnhd", of_logits, key)
    of_key = jnp.einsum("bhnm,bnhd->bmhd", of_logits, query)
    return of_query, of_key, of_value


attention_tpu.defvjp(_attended, _attended_backward)
