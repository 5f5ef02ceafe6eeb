"""A block's second branch, a norm and an MLP, with the sum around it; written twice as the sums of `forms`."""

import jax
import jax.numpy as jnp

from vitpyramid.models.derivatives import with_backward
from vitpyramid.models.forms import at_least_float32, by_device, product, written
from vitpyramid.models.sharding import batch_devices, shard_batch, whole
from vitpyramid.models.token_forms import gelu, gelu_erf, gelu_with_slope, layer_norm, layer_norm_one_pass

# Bytes between the two layers: more than the first do not stay in a chip's fast memory of 128 MiB; some of the second,
# each computed from the one before, do.
LARGEST, PIECE = 2**27, 2**25


def mlp_turns(shape: tuple[int, ...], hidden: int, dtype) -> int:
    """In how many turns a TPU computes the MLP of tokens `shape` `[B, N, C]`; 1: all at once."""
    if dtype != jnp.bfloat16 or not all(isinstance(side, int) for side in shape):  # the batch may be left open
        return 1
    images, rest = divmod(shape[0], batch_devices())
    size = images * shape[1] * hidden * 2
    if rest or size <= LARGEST:
        return 1
    return next(n for n in range(1, images + 1) if images % n == 0 and (size <= n * PIECE or n == images))


def residual_mlp(x, divisor, scale, shift, w1, b1, w2, b2, epsilon: float, turns: int) -> jax.Array:
    """`x + MLP(norm(x)) / divisor`.

    What is between the layers of an MLP are the largest arrays of a network. A TPU writes values, slopes and cotangents
    to its slow memory, and reads each once or twice. Its form takes each device's images in turns, and keeps nothing of
    what is between the layers: the backward pass computes it again. What is there of one turn stays in fast memory.

    Args:
      x: `[B, N, C]`.
      divisor: `[B, 1, 1]`, infinite where drop path drops an image's branch; it gets no gradient.
      scale, shift: of the norm, `[C]`.
      w1, b1: of the first layer, `[C, F]` and `[F]`.
      w2, b2: of the second, `[F, C]` and `[C]`.
      turns: a divisor of the number of images of a device.

    Returns:
      `[B, N, C]` in the dtype of `x`.
    """
    arrays = x, jax.lax.stop_gradient(divisor), scale, shift, w1, b1, w2, b2
    return by_device(residual_mlp_in_turns, residual_mlp_at_once, *arrays, epsilon=epsilon, turns=turns)


def residual_mlp_at_once(x, divisor, scale, shift, w1, b1, w2, b2, epsilon, turns):
    del turns
    w1, b1, w2, b2 = (parameter.astype(x.dtype) for parameter in (w1, b1, w2, b2))
    normed = layer_norm(x, scale, shift, epsilon, x.dtype)
    return written(x + (product(gelu(product(normed, w1) + b1), w2) + b2) / divisor)


def _of_turn(turn, turns, *arrays):
    """What of arrays `[B, ...]` belongs to a turn, `[devices, B / devices / turns, ...]`."""
    cut = [x.reshape(batch_devices(), turns, -1, *x.shape[1:]) for x in arrays]
    cut = [jax.lax.dynamic_index_in_dim(x, turn, axis=1, keepdims=False) for x in cut]
    return jax.lax.optimization_barrier(cut)  # or each of its readers would read it from slow memory


def _put(out, piece, turn, turns):
    cut = out.reshape(batch_devices(), turns, -1, *out.shape[1:])
    return jax.lax.dynamic_update_index_in_dim(cut, piece, turn, axis=1).reshape(out.shape)


def _branch(activation, x, divisor, scale, shift, w1, b1, w2, b2, epsilon):
    w1, b1, w2, b2 = (parameter.astype(x.dtype) for parameter in (w1, b1, w2, b2))
    normed = layer_norm_one_pass(x, scale, shift, epsilon=epsilon, dtype=x.dtype)
    return x + (activation(normed @ w1 + b1) @ w2 + b2) / divisor


def _in_turns(x, divisor, *parameters, epsilon, turns):
    parameters = [whole(parameter) for parameter in parameters]

    def body(turn, out):
        piece = _branch(gelu_erf, *_of_turn(turn, turns, x, divisor), *parameters, epsilon)
        return _put(out, piece, turn, turns)

    out = jax.lax.fori_loop(0, turns, body, shard_batch(jax.lax.empty(x.shape, x.dtype)))
    return out, (x, divisor, *parameters)


def _in_turns_backward(stored, cotangent, epsilon, turns):
    x, divisor, *parameters = stored
    *parameters, b2 = parameters
    wide = at_least_float32(x.dtype)

    def of_device(x, divisor, cotangent):
        _, backward = jax.vjp(
            lambda *inputs: _branch(gelu_with_slope, inputs[0], divisor, *inputs[1:], b2, epsilon), x, *parameters
        )
        return backward(cotangent)

    def body(turn, carry):
        of_x, sums = carry
        # Of each device by itself: the sum over devices is taken once, behind the loop.
        piece, *found = jax.vmap(of_device)(*_of_turn(turn, turns, x, divisor, cotangent))
        return _put(of_x, piece, turn, turns), [a + b for a, b in zip(sums, found, strict=True)]

    sums = [shard_batch(jnp.zeros((batch_devices(), *parameter.shape), wide)) for parameter in parameters]
    empty = shard_batch(jax.lax.empty(x.shape, x.dtype))
    of_x, sums = jax.lax.fori_loop(0, turns, body, (empty, sums))
    sums.append((cotangent / divisor).astype(wide).sum((0, 1), keepdims=True)[0])
    of_parameters = [
        one.astype(x.dtype).sum(0).astype(parameter.dtype)
        for one, parameter in zip(sums, (*parameters, b2), strict=True)
    ]
    return of_x, jnp.zeros_like(divisor), *of_parameters


residual_mlp_in_turns = with_backward(_in_turns, _in_turns_backward)
