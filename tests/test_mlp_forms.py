"""Where a block's MLP is computed in turns, and that its parameters and its random numbers stay what they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitpyramid.models import mlp_forms
from vitpyramid.models.attention import Block, SelfAttention
from vitpyramid.models.layers import Mlp

BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    "shape, hidden, dtype, turns",
    [
        ((64, 3136, 64), 512, BF16, 8),  # PVT's first stage
        ((64, 3136, 96), 384, BF16, 8),  # ResT-Base's
        ((64, 784, 128), 1024, BF16, 1),  # PVT's second, which fits
        ((64, 3136, 64), 512, jnp.float32, 1),
        ((61, 3136, 64), 512, BF16, 61),
        ((1, 200_704, 64), 512, BF16, 1),
    ],
)
def test_turns_follow_from_the_size_between_the_layers(shape, hidden, dtype, turns):
    assert mlp_forms.mlp_turns(shape, hidden, dtype) == turns


def test_a_batch_left_open_is_computed_at_once():
    (images,) = jax.export.symbolic_shape("b")
    assert mlp_forms.mlp_turns((images, 3136, 64), 512, BF16) == 1


def test_turns_follow_from_the_images_of_a_device():
    mesh = jax.sharding.AbstractMesh((4, 4), ("data", "fsdp"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert mlp_forms.mlp_turns((1024, 3136, 64), 512, BF16) == 8
        assert mlp_forms.mlp_turns((1023, 3136, 64), 512, BF16) == 1


def test_a_block_in_turns_is_the_same_block(monkeypatch):
    """Bit for bit where there is one form, with drop path; the TPU's program has two loops, forward and backward."""
    fields = {"heads": 2, "qkv_bias": True, "dtype": BF16}
    block = Block(
        functools.partial(SelfAttention, **fields),
        functools.partial(Mlp, 3, dtype=BF16),
        1e-6,
        drop_path=0.5,
        dtype=BF16,
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 16)), BF16)
    variables = block.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def loss(variables, x):
        return block.apply(variables, x, rngs={"dropout": jax.random.key(2)}).astype(jnp.float32).sum()

    found = []
    for largest in (mlp_forms.LARGEST, 0):
        monkeypatch.setattr(mlp_forms, "LARGEST", largest)
        monkeypatch.setattr(mlp_forms, "PIECE", 2 * 5 * 48 * 2)  # of two images
        traced = jax.jit(jax.value_and_grad(loss)).trace(variables, x)
        loops = traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.while")
        found.append((loops, traced.lower().compile()(variables, x)))
    (loops, expected), (loops_in_turns, got) = found
    assert loops_in_turns == loops + 2
    jax.tree.map(np.testing.assert_array_equal, got, expected)
