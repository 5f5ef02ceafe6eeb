"""Functions with a backward pass of their own: every other derivative is that of what they compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitpyramid import create_model
from vitpyramid.models import forms, token_forms
from vitpyramid.models.derivatives import with_backward

FUNCTIONS = {
    "norm": (
        functools.partial(token_forms.layer_norm_two_passes, epsilon=1e-6, dtype=jnp.float64),
        [(2, 5), (5,), (5,)],
    ),
    "gelu": (token_forms.gelu_erf, [(2, 3)]),
    "attention": (
        functools.partial(token_forms.attention_products, scale=0.7),
        [(1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 4)],
    ),
    "convolution": (
        functools.partial(forms.convolution_of_places, window_strides=(2, 1), padding=((1, 1), (0, 1))),
        [(1, 4, 3, 2), (3, 2, 2, 2)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_modes_agree(name):
    """Forward and reverse mode, second derivatives in three orders, and both under vmap: of one function."""
    function, shapes = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    inputs, vector = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))

    def scalar(*inputs):
        out = function(*inputs)
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    def dot(function):
        return lambda *inputs: sum(map(jnp.vdot, jax.grad(function, range(len(shapes)))(*inputs), vector))

    def along(function):
        return lambda *inputs: jax.jvp(function, inputs, tuple(vector))[1]

    @jax.jit
    def derivatives(*inputs):
        of_row = jax.vmap(lambda *inputs: (along(scalar)(*inputs), dot(scalar)(*inputs)))
        two = of_row(*(jnp.stack([x, 2 * x]) for x in inputs))
        outside = dot(lambda *inputs: jax.vmap(scalar)(*(x[None] for x in inputs)).sum())
        first = [dot(scalar)(*inputs), along(scalar)(*inputs), outside(*inputs), two[0][0], two[1][0]]
        second = [dot(dot(scalar)), along(dot(scalar)), dot(along(scalar)), along(along(scalar))]
        return first, [function(*inputs) for function in second], two

    def difference(function, step=1e-6):
        up, down = (function(*(x + h * v for x, v in zip(inputs, vector, strict=True))) for h in (step, -step))
        return (up - down) / (2 * step)

    with jax.enable_x64(True):
        first, second, two = derivatives(*inputs)
        np.testing.assert_allclose(first, difference(jax.jit(scalar)), rtol=1e-7)
        np.testing.assert_allclose(second, difference(jax.jit(dot(scalar))), rtol=1e-7)
        np.testing.assert_allclose(*two, rtol=1e-12)


def test_the_backward_pass_is_the_one_given():
    """In a loop, recomputed, of trees: JAX's own derivative is not taken."""
    function = with_backward(
        lambda x, y, factor: ((x * y, (factor * x,)), y),
        lambda y, cotangent, factor: (cotangent[0] * y + 100 * factor * cotangent[1][0], jnp.zeros_like(y)),
    )

    def loss(x):
        turn = jax.checkpoint(lambda x, _: (function(x, 2.0, factor=3.0)[0], function(x, 5.0, factor=3.0)[1][0]))
        last, each = jax.lax.scan(turn, x, length=2)
        return last + each.sum()

    # Each turn: of `last` 2, of `each` 300.
    assert jax.jit(jax.grad(loss))(1.0) == 300 + 2 * (300 + 2)
    assert jax.jvp(loss, (1.0,), (1.0,))[1] == 3 + 2 * (3 + 2)
    np.testing.assert_array_equal(jax.jacobian(lambda x: function(x, x, factor=3.0)[0])(2.0), 2.0)


@pytest.mark.parametrize(
    "name, dtype",
    [("pvt_micro", "float32"), ("pit_micro", "bfloat16"), ("t2t_vit_micro", "bfloat16"), ("rest_micro", "float32")],
)
def test_networks_have_forward_mode(name, dtype):
    """Traced for every device: of what is computed there are all derivatives."""
    model = create_model(name, dtype=jnp.dtype(dtype))
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.dtype(dtype))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def along(variables, x):
        def loss(x):
            return model.apply(variables, x).sum()

        return jax.jvp(loss, (x,), (jnp.ones_like(x),)), jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))

    (_, tangent), (_, product) = jax.eval_shape(along, variables, x)
    assert tangent.shape == () and product.shape == x.shape
