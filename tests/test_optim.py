"""The optimizer: rules over parameters, layer-wise decay, SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from two_heads import TwoHeads, assert_close, config_of, one_step
from vitpyramid.models.registry import get_variant
from vitpyramid.train.optim import layers_to_head, lr_factors, make_optimizer
from vitpyramid.train.schedule import Horizon


def test_frozen_parameters_stay_and_do_not_count_in_the_norm():
    rules = (("^head/", 1.0), ("^head_dist/", 0.5), (".*", 0.0))
    before, state, metrics = one_step(config_of(**{"optim.lr_rules": rules, "optim.name": "adamw"}))
    jax.tree.map(np.testing.assert_array_equal, before.params["body"], state.params["body"])
    assert not np.array_equal(before.params["head"]["kernel"], state.params["head"]["kernel"])
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not any("body" in jax.tree_util.keystr(path) for path, _ in moments)
    _, _, all_metrics = one_step(config_of())
    assert 0 < metrics["grad_norm"] < all_metrics["grad_norm"]


def test_rates_by_path_multiply_the_step():
    before, plain, _ = one_step(config_of())
    _, ruled, _ = one_step(config_of(**{"optim.lr_rules": (("head", 1.0), ("body", 0.25))}))
    moved, ruled_moved = (jax.tree.map(jnp.subtract, state.params, before.params) for state in (plain, ruled))
    assert_close(ruled_moved["head"], moved["head"])
    assert_close(ruled_moved["body"], jax.tree.map(lambda x: 0.25 * x, moved["body"]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [((("head", 1.0),), "no rule covers body/"), (((".*", 1.0), ("head", 0.1)), "covers no parameter that an earlier")],
)
def test_every_parameter_needs_a_rule_and_every_rule_a_parameter(rules, message):
    params = {"body": {"kernel": 0, "bias": 0}, "head": {"kernel": 0}}
    with pytest.raises(ValueError, match=message):
        lr_factors(params, rules)


def depths(name: str) -> dict:
    model = get_variant(name).model
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return traverse_util.flatten_dict(layers_to_head(params, model), sep="/")


def test_layers_to_head():
    pvt = depths("pvt_tiny")  # 2 blocks a stage
    for path, depth in {
        "head/kernel": 0,
        "norm/scale": 0,
        "block4_1/attn/q/kernel": 1,
        "block4_0/norm1/bias": 2,
        "patch_embed4/proj/kernel": 3,
        "pos_embed4": 3,
        "cls_token": 3,
        "block3_1/mlp/fc1/kernel": 3,
        "block1_0/attn/q/kernel": 8,
        "patch_embed1/proj/kernel": 9,
    }.items():
        assert pvt[path] == depth, path
    pit = depths("pit_ti")  # 2, 6, 4 blocks
    assert (pit["transformers_2/blocks_3/norm1/scale"], pit["pools_1/fc/kernel"]) == (1, 5)
    assert (pit["transformers_1/blocks_5/norm1/scale"], pit["pools_0/fc/kernel"], pit["pos_embed"]) == (5, 11, 13)
    t2t = depths("t2t_vit_7")
    assert (t2t["blocks_6/mlp/fc1/bias"], t2t["tokens_to_token/project/kernel"], t2t["cls_token"]) == (1, 8, 8)
    rest = depths("rest_lite")
    assert (rest["stage4_1/norm1/scale"], rest["patch_embedding_4/conv/kernel"], rest["stem/conv1/kernel"]) == (1, 3, 9)
    regnety = depths("regnety_160")  # 2, 4, 11, 1 blocks
    found = [regnety[f"{path}/conv/kernel"] for path in ("s4/b1/conv1", "s3/b11/conv3", "s1/b1/downsample", "stem")]
    assert found == [1, 2, 18, 19]


def test_a_parameter_of_no_layer_is_named():
    with pytest.raises(ValueError, match="body/kernel: expected in the stages of TwoHeads"):
        layers_to_head({"head": {"kernel": 0}, "body": {"kernel": 0}}, TwoHeads())


def test_layer_decay_multiplies_the_step():
    params = {"head": {"kernel": jnp.ones(3)}, "blocks_0": {"kernel": jnp.ones(3)}, "cls_token": jnp.ones(3)}
    config = config_of(**{"optim.layer_decay": 0.5})
    tx = make_optimizer(config, Horizon.of(config, 160), params, TwoHeads()).tx
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(updates[key]["kernel"][0]) for key in ("head", "blocks_0")] == [-1.0, -0.5]
    assert float(updates["cls_token"][0]) == -0.25


def test_sgd_is_pytorchs():
    """Decay joins the gradient; momentum without dampening: torch.optim.SGD, two steps by hand."""
    config = config_of(**{"optim.momentum": 0.9, "optim.lr": 0.1, "optim.decay_vectors": True})
    config.optim.weight_decay = 0.5
    params = {"head": {"bias": jnp.array([1.0])}}
    tx = make_optimizer(config, Horizon.of(config, 160), params, TwoHeads()).tx
    state, velocity, x = tx.init(params), 0.0, 1.0
    for gradient in (2.0, -1.0):
        updates, state = tx.update({"head": {"bias": jnp.array([gradient])}}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + gradient + 0.5 * x
        x -= 0.1 * velocity
        assert float(params["head"]["bias"][0]) == pytest.approx(x, rel=1e-6)
