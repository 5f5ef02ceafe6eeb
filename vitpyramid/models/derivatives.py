"""Functions whose backward pass is written by hand, and that forward mode and further derivatives go through as well.

`jax.custom_vjp` refuses forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`). Here the tangent is JAX's own, and
only its transpose, which is what reverse mode computes, is replaced.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_backward(forward: Callable, backward: Callable) -> Callable:
    """A function of arrays, and of hashable options by keyword, with its reverse-mode derivative.

    Args:
      forward: `(*arrays, **options)` -> the result and what the backward pass needs, arrays or trees of them.
      backward: `(stored, cotangent, **options)` -> a cotangent for each of the arrays, of its shape and dtype.

    Returns:
      The function `(*arrays, **options)` -> result.
    """

    @functools.wraps(forward)
    def function(*arrays, **options):
        return _with_options(forward, backward, tuple(sorted(options.items())))(*map(jnp.asarray, arrays))

    return function


@functools.cache
def _with_options(forward, backward, options):
    options = dict(options)
    forward, backward = functools.partial(forward, **options), functools.partial(backward, **options)

    @jax.custom_jvp
    def function(*arrays):
        return forward(*arrays)[0]

    @function.defjvp
    def derivative(arrays, tangents):
        out, stored = forward(*arrays)
        leaves, tree = jax.tree.flatten((arrays, stored))
        like, out_tree = jax.tree.flatten(out)

        def push(leaves, tangents):
            arrays, _ = jax.tree.unflatten(tree, leaves)
            return jax.tree.leaves(jax.jvp(lambda *arrays: forward(*arrays)[0], arrays, tuple(tangents))[1])

        def pull(leaves, cotangents):
            _, stored = jax.tree.unflatten(tree, leaves)
            return list(backward(stored, jax.tree.unflatten(out_tree, cotangents)))

        return out, jax.tree.unflatten(out_tree, _apply(push, pull, leaves, tangents, like))

    return function


def _apply(push, pull, stored, tangents, like):
    """`push(stored, tangents)`, arrays as those in `like`; `pull(stored, cotangents)` is its transpose."""
    shapes = [jax.core.ShapedArray(x.shape, x.dtype) for x in (*tangents, *like)]
    ins, outs = tuple(shapes[: len(tangents)]), tuple(shapes[len(tangents) :])
    return linear_p.bind(*stored, *tangents, push=push, pull=pull, ins=ins, outs=outs)


def _split(values, ins):
    count = len(values) - len(ins)
    return list(values[:count]), list(values[count:])


def _evaluate(*values, push, pull, ins, outs):
    del pull, outs
    return push(*_split(values, ins))


def _jvp(primals, tangents, *, push, pull, ins, outs):
    (stored, linear), (of_stored, of_linear) = _split(primals, ins), _split(tangents, ins)
    result = _apply(push, pull, stored, linear, outs)
    of_linear = [ad.instantiate_zeros(tangent) for tangent in of_linear]
    of_result = _apply(push, pull, stored, of_linear, outs)
    if not all(type(tangent) is ad.Zero for tangent in of_stored):
        of_stored = [ad.instantiate_zeros(tangent) for tangent in of_stored]
        _, further = jax.jvp(lambda stored: push(stored, linear), (stored,), (of_stored,))
        of_result = [a + b for a, b in zip(of_result, further, strict=True)]
    return result, of_result


def _transpose(cotangents, *values, push, pull, ins, outs):
    stored, linear = _split(values, ins)
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = _apply(pull, push, stored, cotangents, ins)
    # What is known is the zero that stands for a tangent of what is not differentiated.
    found = [x if ad.is_undefined_primal(place) else None for x, place in zip(found, linear, strict=True)]
    return [None] * len(stored) + found


def _batch(values, axes, *, push, pull, ins, outs):
    (size,) = {x.shape[axis] for x, axis in zip(values, axes, strict=True) if axis is not None}
    (stored, linear), (of_stored, of_linear) = _split(values, ins), _split(axes, ins)
    linear = [batching.bdim_at_front(x, axis, size) for x, axis in zip(linear, of_linear, strict=True)]
    push, pull = (jax.vmap(function, in_axes=(of_stored, 0)) for function in (push, pull))
    like = [jax.core.ShapedArray((size, *aval.shape), aval.dtype) for aval in outs]
    return _apply(push, pull, stored, linear, like), [0] * len(outs)


linear_p = Primitive("linear_with_transpose")
linear_p.multiple_results = True
linear_p.def_impl(_evaluate)
linear_p.def_abstract_eval(lambda *values, push, pull, ins, outs: outs)
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(linear_p, mlir.lower_fun(_evaluate, multiple_results=True))
