"""T2T-ViT's named networks: parameters, names, multiply-accumulates, shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import t2t_by_hand
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.models.t2t_module import token_grid
from vitpyramid.models.t2t_vit import GhostBlock
from vitpyramid.weights import flax_to_torch, torch_to_flax

VARIANTS = {
    "t2t_vit_7": 4_255_694,
    "t2t_vit_10": 5_834_702,
    "t2t_vit_12": 6_887_374,
    "t2t_vit_14": 21_465_806,
    "t2t_vit_19": 39_085_070,
    "t2t_vit_24": 64_000_974,
    "t2t_vit_t_14": 21_465_422,
    "t2t_vit_t_19": 39_084_686,
    "t2t_vit_t_24": 64_000_590,
    "t2t_vit_14_resnext": 21_465_806,
    "t2t_vit_14_wide": 25_000_910,
    "t2t_vit_14_se": 21_723_854,
    "t2t_vit_16_ghost": 16_173_518,
    "t2t_vit_dense": 23_617_750,
    "t2t_vit_c_14": 21_346_344,
}
OWN = ("t2t_vit_c_14",)  # not in the official code


def abstract_variables(model):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_official_code(name):
    variables = abstract_variables(create_model(name))
    assert sorted(variables) == ["constants", "params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert params == VARIANTS[name] == get_variant(name).params
    rng = np.random.default_rng(0)
    integers = jax.tree.map(lambda leaf: rng.integers(-99, 99, leaf.shape, np.int8), variables)
    state_dict = flax_to_torch(name, integers)
    jax.tree.map(np.testing.assert_array_equal, torch_to_flax(name, state_dict), integers)
    if name not in OWN:
        entry = golden.manifest()[name]
        assert params == entry["parameters"]
        assert {key: list(array.shape) for key, array in state_dict.items()} == entry["state_dict"]


def test_convolution_variant_has_the_official_names():
    """Those of `T2T_module` with `tokens_type="convolution"`; the backbone is that of `t2t_vit_14`."""
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_variables(create_model("t2t_vit_c_14")))
    shapes = {key: array.shape for key, array in flax_to_torch("t2t_vit_c_14", variables).items()}
    tokens = {key: shape for key, shape in shapes.items() if key.startswith("tokens_to_token.")}
    assert tokens == {
        "tokens_to_token.soft_split0.weight": (64, 3, 7, 7),
        "tokens_to_token.soft_split0.bias": (64,),
        "tokens_to_token.soft_split1.weight": (64, 64, 3, 3),
        "tokens_to_token.soft_split1.bias": (64,),
        "tokens_to_token.project.weight": (384, 64, 3, 3),
        "tokens_to_token.project.bias": (384,),
    }
    others = {key: list(shape) for key, shape in shapes.items() if key not in tokens}
    official = golden.manifest()["t2t_vit_14"]["state_dict"]
    assert others == {key: shape for key, shape in official.items() if not key.startswith("tokens_to_token.")}


def macs(jaxpr) -> int:
    """Multiply-accumulates of all matrix products and convolutions in a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
            total += int(depth) * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval  # [h, w, in, out]
            total += kernel.size // kernel.shape[-1] * equation.outvars[0].aval.size
        total += sum(macs(p.jaxpr) for p in equation.params.values() if hasattr(p, "jaxpr"))
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_multiply_accumulates_are_those_of_the_official_code(name):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    total = macs(jax.make_jaxpr(model.apply)(abstract_variables(model), images).jaxpr)
    if model.tokens_type == "performer":
        total += (56 * 56 + 28 * 28) * 32  # the denominator's products, here a sum
    if model.block is GhostBlock:
        total += model.depth * 197 * (3 * 192 + 2 * 384)  # the cheap operations, here products
    if name not in OWN:
        assert total == golden.manifest()[name]["macs"]
    published_otherwise = 0.25 if name in ("t2t_vit_14_wide", "t2t_vit_dense", "t2t_vit_24") else 0.12
    assert total / 1e9 == pytest.approx(get_variant(name).gmacs, abs=published_otherwise)


SIZES = [(224, 224), (192, 256), (225, 225), (200, 232), (256, 832), (384, 384), (448, 448), (100, 167)]


@pytest.mark.parametrize("name, dim", [("t2t_vit_7", 256), ("t2t_vit_t_14", 384), ("t2t_vit_dense", 584)])
def test_features_have_their_strides_and_widths(name, dim):
    model = create_model(name)
    variables = abstract_variables(model)
    for size in SIZES if name == "t2t_vit_7" else SIZES[1:2]:
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        (level,) = jax.eval_shape(functools.partial(model.apply, method="features"), variables, images)
        assert (level.stride,) == model.strides == (16,)
        assert level.x.shape == (2, *token_grid(*size), dim)
        assert jax.eval_shape(model.apply, variables, images).shape == (2, 1000)


@pytest.mark.parametrize("name, heads", [("t2t_vit_14_wide", 12), ("t2t_vit_dense", 8)])
def test_variants_equal_numpy(name, heads):
    """Through the converter, at the variants' own depths; the width of `t2t_vit_dense` grows."""
    model, images = create_model(name), np.random.default_rng(0).standard_normal((1, 32, 48, 3)).astype(np.float32)
    shapes = golden.manifest()[name]["state_dict"]
    weights = {key: golden.weight(key, tuple(shape), 0, "standard") for key, shape in shapes.items()}
    apply = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
    logits = apply(torch_to_flax(name, weights), images)
    assert golden.relative_error(logits, t2t_by_hand.logits(weights, images, heads)) < 1e-5
