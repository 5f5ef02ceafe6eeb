"""Blocks in one compiled loop are the same blocks."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vitpyramid import create_model
from vitpyramid.models.backbone import Stage
from vitpyramid.models.stack import apply_blocks, is_stacked, stack_blocks, unstack_blocks

SMALL = {"depths": (2, 3, 1, 2), "dims": (16, 32, 64, 64), "heads": (1, 2, 4, 4), "num_classes": 10, "image_size": 32}


def loss(model, params, images):
    return (model.apply({"params": params}, images, train=True) ** 2).sum()


def test_scan_equals_unrolled_blocks():
    plain = create_model("pvt_micro", **SMALL)
    scanned = create_model("pvt_micro", **SMALL, remat=True, scan=True)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    params = jax.jit(plain.init)(jax.random.key(0), images)["params"]
    stacked = stack_blocks(params, plain.stages)
    expected_shapes = jax.eval_shape(scanned.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, expected_shapes)
    chex.assert_trees_all_equal(jax.device_get(unstack_blocks(stacked, plain.stages)), jax.device_get(params))

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(plain, p, images)))(params)
    value_scanned, gradient_scanned = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p, images)))(stacked)
    assert float(value_scanned) == pytest.approx(float(value), rel=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    gradients = jax.device_get((unstack_blocks(gradient_scanned, plain.stages), gradient))
    chex.assert_trees_all_close(*gradients, rtol=0, atol=1e-5 * largest)


class AddRate(nn.Module):
    """Adds its own drop path rate."""

    drop_path: float

    @nn.compact
    def __call__(self, x):
        return x + self.param("scale", nn.initializers.ones, ()) * self.drop_path


class Loop(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        return apply_blocks(AddRate, {}, x, [0.0, 0.125, 0.25], "blocks", remat=True, scan=self.scan)


@pytest.mark.parametrize("scan", [False, True])
def test_each_block_has_its_own_drop_path(scan):
    out, variables = Loop(scan).init_with_output(jax.random.key(0), jnp.zeros(2))
    assert out.tolist() == [0.375, 0.375]
    weights = jnp.array([1.0, 2.0, 4.0])
    params = {"blocks": {"scale": weights}} if scan else {f"blocks_{j}": {"scale": weights[j]} for j in range(3)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    assert Loop(scan).apply({"params": params}, jnp.zeros(1)).tolist() == [1.25]


def test_scan_needs_remat():
    with pytest.raises(ValueError, match="remat=True"):
        jax.eval_shape(create_model("pvt_micro", scan=True).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_blocks_are_stacked_in_order():
    params = {f"blocks_{i}": {"scale": jnp.full(2, i)} for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    stages = [Stage((), tuple(f"blocks_{i}" for i in range(11)))]
    assert stack_blocks(params, stages)["blocks"]["scale"][:, 0].tolist() == list(range(11))


def test_only_what_is_stacked_is():
    pvt, regnety = create_model("pvt_micro"), create_model("regnety_micro")
    assert is_stacked("block1/attn/q/kernel", pvt.stages)
    assert not is_stacked("block1_0/attn/q/kernel", pvt.stages)
    assert not is_stacked("s1/b1/conv1/conv/kernel", regnety.stages)
