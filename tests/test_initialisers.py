"""Initial values drawn together are those that Flax draws one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vitpyramid import create_model
from vitpyramid.models import initialisers
from vitpyramid.models.layers import Mlp


class Step(nn.Module):
    """One turn of a loop."""

    @nn.compact
    def __call__(self, x, _):
        return Mlp(70, torch_init=True, name="mlp")(x), None


class Network(nn.Module):
    """Parameters of every kind, one longer than a piece: plain, recomputed, in a loop, by Flax's own initialiser."""

    @nn.compact
    def __call__(self, x, train):
        x = Mlp(300, name="plain")(x)
        x = nn.remat(Mlp)(2, torch_init=True, name="recomputed")(x)
        loop = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = loop(name="loop")(x, None)
        return x @ self.param("own", nn.initializers.orthogonal(), (4, 4))


X = jnp.zeros((2, 4))
by_flax = jax.jit(lambda key: nn.Module.init(Network(), key, X, False))


@pytest.mark.parametrize(
    ("key", "same"),
    [
        (jax.random.key(3), jax.random.key(3)),
        (jax.random.PRNGKey(3), jax.random.key(3)),
        ({"params": jax.random.key(4), "dropout": jax.random.key(5)}, jax.random.key(4)),
    ],
    ids=["typed", "untyped", "streams"],
)
def test_values_are_flaxs(key, same):
    found, expected = initialisers.init(Network(), key, X, False, None), by_flax(same)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    expected = traverse_util.flatten_dict(expected, sep="/")
    for path, value in traverse_util.flatten_dict(found, sep="/").items():
        assert value.dtype == jnp.float32
        # Two programs round differently, most of all the orthogonal one's QR. Other numbers would be off by 0.01.
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-6, err_msg=path)


def test_keys_of_another_kind_are_flaxs_own():
    model, key = create_model("pvt_micro"), jax.random.key(3, impl="rbg")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    names = [equation.primitive.name for equation in jax.make_jaxpr(model.init)(key, images).eqns]
    assert names.count("random_fold_in") > 20


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"remat": True, "scan": True}])
def test_a_network_is_one_loop_a_kind_of_number_and_no_forward_pass(options):
    model = create_model("pvt_micro", **options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = jax.make_jaxpr(model.init)(jax.random.key(0), images)
    names = [equation.primitive.name for equation in program.eqns]
    assert "dot_general" not in names
    assert [equation.params.get("name") for equation in program.eqns].count("_draw_flat") == 2
    assert "random_fold_in" not in names
