"""T2T-ViT against results of the official code and against a forward pass in numpy, and properties of the network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
import t2t_by_hand
from harness import assert_within, golden_run
from vitpyramid.models.attention import Block
from vitpyramid.models.layers import DropPath
from vitpyramid.models.registry import create_model
from vitpyramid.models.stack import stack_blocks, unstack_blocks
from vitpyramid.models.t2t_vit import DenseBlock, GhostBlock, SEBlock, T2TViTDense, sinusoid

GOLDENS = [
    ("t2t_vit_7_224x224", "float64", ()),
    ("t2t_vit_7_224x224", "float32", ()),
    ("t2t_vit_7_224x224_small", "float64", ()),
    ("t2t_vit_7_160x160_img_size160", "float64", (("image_size", 160),)),
    ("t2t_vit_7_224x224_qk_scale0.0625", "float64", (("qk_scale", 0.0625),)),
    ("t2t_vit_t_14_224x224", "float64", ()),
]
NO_DROPOUT = (("token_drop_rate", 0.0),)

# Compiling is most of these tests' time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def little(**fields):
    """Two blocks of width 32, two heads; class and other fields as `fields` say."""
    return create_model("t2t_vit_micro", **{"embed_dim": 32, "heads": 2, "num_classes": 5, **fields})


def little_dense(**fields):
    fields = {"heads": 2, "num_classes": 5, "image_size": 32, "groups": (1, 2), "growth": 8, **fields}
    return T2TViTDense(16, 12, mlp_ratio=2, **fields)


LITTLE = {
    "performer": little,
    "transformer": functools.partial(little, tokens_type="transformer"),
    "convolution": functools.partial(little, tokens_type="convolution"),
    "se": functools.partial(little, block=SEBlock),
    "ghost": functools.partial(little, block=GhostBlock),
    "dense": little_dense,
}


@functools.partial(quick_jit, static_argnums=0, static_argnames=("train", "method"))
def apply(model, variables, images, seed=0, *, train=False, method=None):
    """`model.apply` in one program; dropout draws from `seed`."""
    return model.apply(variables, images, train=train, method=method, rngs={"dropout": jax.random.key(seed)})


def random_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def abstract_variables(model):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def random_variables(model, seed=0):
    """Variables at unit scale, so that every part of the network moves the output."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "pos_embed":
            return sinusoid(*leaf.shape[1:])
        scale = 1.0 if leaf.ndim == 3 else max(0.1, leaf.shape[0] ** -0.5)
        return rng.standard_normal(leaf.shape).astype(np.float32) * np.float32(scale)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def taps(model, variables, images):
    """Logits, and what the golden files hold of the network's inside."""

    def run(module, images):
        tokens, _ = module.encode(images, False)
        return module.head(module.norm(tokens[:, 0])), module.norm(tokens)

    keep = {"capture_intermediates": lambda module, _: module.name == "tokens_to_token", "mutable": ["intermediates"]}
    (logits, final), state = model.apply(variables, images, method=run, **keep)
    tokens = state["intermediates"]["tokens_to_token"]["__call__"][0]
    return logits, {"tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1]), "final": final}


@pytest.mark.parametrize("stem, precision, overrides", GOLDENS)
def test_equals_official_code(stem, precision, overrides):
    forward, train, _ = golden_run(stem, precision, taps, NO_DROPOUT + overrides)
    assert_within(forward | train, precision)


@pytest.mark.parametrize("kind, qk_scale", [(kind, scale) for kind in LITTLE for scale in (None, 0.7)])
def test_equals_numpy(kind, qk_scale):
    """Not square and not divisible by anything: grids follow the convolutions. `qk_scale` is the backbone's alone."""
    variables, images = random_variables(LITTLE[kind]()), random_images(2, 51, 76)
    expected = t2t_by_hand.logits(t2t_by_hand.torch_names(variables), images, 2, qk_scale)
    with jax.enable_x64(True):
        variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, images))
        logits = apply(LITTLE[kind](dtype=jnp.float64, qk_scale=qk_scale), variables, images)
    assert golden.relative_error(logits, expected) < 1e-9


@pytest.mark.parametrize("size", [(3, 3), (16, 16), (200, 232), (100, 167), (225, 225)])
def test_any_size_equals_numpy(size):
    model, images = little(), random_images(1, *size)
    variables = random_variables(model)
    expected = t2t_by_hand.logits(t2t_by_hand.torch_names(variables), images, heads=2)
    assert golden.relative_error(apply(model, variables, images), expected) < 1e-4


def test_features_are_patch_tokens_of_the_last_block():
    model, images = little(), random_images(2, 32, 48)
    variables = random_variables(model)
    (level,) = apply(model, variables, images, method="features")
    tokens, _ = jax.jit(lambda v, x: model.apply(v, x, False, method="encode"))(variables, images)
    assert golden.relative_error(level.x.reshape(2, 6, 32), tokens[:, 1:]) < 1e-6


def test_stored_positions_are_used_at_their_number_of_tokens_alone():
    model = little(image_size=64)  # 16 tokens
    variables = random_variables(model)
    assert variables["constants"]["pos_embed"].shape == (1, 17, 32)
    other = {**variables, "constants": jax.tree.map(lambda x: 1 - x, variables["constants"])}
    other["constants"]["tokens_to_token"] = variables["constants"]["tokens_to_token"]
    for size, used in {(64, 64): True, (32, 128): True, (64, 80): False}.items():
        images = random_images(1, *size)
        difference = golden.relative_error(apply(model, other, images), apply(model, variables, images))
        assert (difference > 0.01) == used, size


def test_positions_are_a_sinusoid():
    table = sinusoid(197, 256)
    np.testing.assert_array_equal(table, golden.sinusoid(197, 256))
    assert table.dtype == np.float32
    variables = quick_jit(little(image_size=48).init)(jax.random.key(0), random_images(1, 16, 16))
    np.testing.assert_array_equal(variables["constants"]["pos_embed"], golden.sinusoid(10, 32))


@pytest.mark.parametrize("shape", [(1, 2, 64, 3), (1, 64, 2, 3), (64, 64, 3)])
def test_images_too_small_or_without_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"images have shape .*, expected \[B, H, W, C\] with H and W at least 3"):
        jax.eval_shape(little().init, jax.random.key(0), jnp.zeros(shape))


def test_unknown_tokens_type_is_refused():
    with pytest.raises(ValueError, match="'linformer', expected one of performer, transformer, convolution"):
        abstract_variables(little(tokens_type="linformer"))


def test_dense_blocks_are_not_scanned():
    with pytest.raises(ValueError, match="scan=True"):
        abstract_variables(little_dense(remat=True, scan=True))


@pytest.mark.parametrize("kind", ["performer", "dense"])
def test_remat_changes_nothing_but_recomputes(kind):
    variables, images = random_variables(LITTLE[kind]()), random_images(4, 32, 32)
    params, constants = variables["params"], variables["constants"]

    def loss(params, remat):
        model = LITTLE[kind](remat=remat, attn_drop_rate=0.1, drop_path_rate=0.5)
        rngs = {"dropout": jax.random.key(1)}
        return jnp.sum(model.apply({"params": params, "constants": constants}, images, train=True, rngs=rngs) ** 2)

    traced = [quick_jit(jax.value_and_grad(loss), static_argnums=1).trace(params, remat) for remat in (False, True)]
    layers = {"performer": 2 + 2, "dense": 2 + 3}[kind]
    assert [str(program.jaxpr).count("remat2[") for program in traced] == [0, layers]
    plain, recomputed = (program.lower().compile()(params) for program in traced)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, recomputed)


@pytest.mark.parametrize("kind", ["performer", "se", "ghost"])
def test_scan_equals_unrolled_blocks(kind):
    variables, images = random_variables(LITTLE[kind]()), random_images(2, 32, 32)
    stacked = {**variables, "params": stack_blocks(variables["params"])}
    assert "blocks" in stacked["params"]
    scanned = apply(LITTLE[kind](remat=True, scan=True), stacked, images)
    assert golden.relative_error(scanned, apply(LITTLE[kind](), variables, images)) < 1e-5
    assert jax.tree.structure(unstack_blocks(stacked["params"])) == jax.tree.structure(variables["params"])


def test_gradient_reaches_every_parameter():
    _, _, grads = golden_run("t2t_vit_7_224x224", "float64", taps, NO_DROPOUT)
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    assert all(np.linalg.norm(grad) > 1e-6 * total for grad in grads.values())


@pytest.mark.parametrize("kind", ["convolution", "se", "ghost", "dense"])
def test_gradient_reaches_every_parameter_of_the_studies(kind):
    fields = {"embed_dim": 64} if kind == "se" else {}  # as many as 4 units behind the ReLU
    model, images = LITTLE[kind](**fields), random_images(2, 32, 32)
    variables = random_variables(model)

    @quick_jit
    def gradient(params):
        return jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({**variables, "params": params}, images))))(params)

    grads = traverse_util.flatten_dict(gradient(variables["params"]), sep="/")
    total = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    assert not [path for path, grad in grads.items() if not np.linalg.norm(grad) > 1e-5 * total]


@pytest.mark.parametrize("kind", LITTLE)
def test_bfloat16_is_close_and_finite_at_large_activations(kind):
    variables, images = random_variables(LITTLE[kind]()), random_images(2, 32, 32)
    half = LITTLE[kind](dtype=jnp.bfloat16, token_drop_rate=0.0)

    @quick_jit
    def run(variables, images):
        def loss(params):
            logits = half.apply({**variables, "params": params}, images, train=True)
            return jnp.sum(jnp.sin(logits)), logits

        (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return logits, grads

    logits, _ = run(variables, images)
    assert logits.dtype == jnp.float32
    expected = t2t_by_hand.logits(t2t_by_hand.torch_names(variables), images, heads=2)
    assert 1e-4 < golden.relative_error(logits, expected) < 0.1

    # Layers that write to the residual stream, and those that make queries and keys.
    large = {"project", "proj", "mlp_2", "fc2", "dense_linear", "soft_split0", "kqv", "qkv", "q", "k", "v"}

    def enlarge(path, x):
        return x * 1000 if path[-1].key == "cls_token" or path[-2].key in large else x

    params = jax.tree_util.tree_map_with_path(enlarge, variables["params"])
    logits, grads = run({**variables, "params": params}, images * 1000)
    assert all(np.isfinite(x).all() for x in (logits, *jax.tree.leaves(grads)))


def test_bfloat16_keeps_parameters_and_constants_in_float32():
    half = little(dtype=jnp.bfloat16)
    created = abstract_variables(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.bfloat16)
    (level,) = jax.eval_shape(functools.partial(half.apply, method="features"), created, images)
    assert level.x.dtype == jnp.bfloat16


def test_attention_maps_are_sown():
    model, images = LITTLE["transformer"](), random_images(2, 32, 48)
    _, state = jax.jit(functools.partial(model.apply, mutable="intermediates"))(random_variables(model), images)
    maps = traverse_util.flatten_dict(state["intermediates"], sep="/")
    shapes = {"tokens_to_token/attention1": (2, 1, 96, 96), "tokens_to_token/attention2": (2, 1, 24, 24)}
    for module, shape in {**shapes, "blocks_0": (2, 2, 7, 7), "blocks_1": (2, 2, 7, 7)}.items():
        (weights,) = maps[f"{module}/attn/attention"]
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def calls_of(kind: type, model, train: bool) -> list:
    """Modules of class `kind` in order of their calls."""
    modules = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            modules[context.module.path] = context.module  # once, though `super().__call__` is a call as well
        return call(*args, **kwargs)

    def run(variables, images):
        with nn.intercept_methods(record):
            return model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(0)})

    jax.eval_shape(run, abstract_variables(model), random_images(1, 32, 32))
    return list(modules.values())


def test_drop_path_grows_from_zero_to_the_rate_over_all_blocks():
    model = little(depth=5, drop_path_rate=0.4)
    rates = [0, 0.1, 0.2, 0.3, 0.4]
    assert [block.drop_path for block in calls_of(Block, model, train=True)] == pytest.approx(rates)
    assert [branch.rate for branch in calls_of(DropPath, model, train=True)] == pytest.approx(np.repeat(rates, 2))
    assert [branch.rate for branch in calls_of(DropPath, model, train=False)] == [0] * 10


@pytest.mark.parametrize("block", [SEBlock, GhostBlock])
def test_drop_path_reaches_both_branches_of_the_studies(block):
    model = little(block=block, drop_path_rate=0.4)
    assert [branch.rate for branch in calls_of(DropPath, model, train=True)] == pytest.approx([0, 0, 0.4, 0.4])


def test_drop_path_of_dense_blocks_goes_by_group():
    """A schedule of 12 entries, of which the four groups take the first four: so it is in the official code."""
    model = create_model("t2t_vit_dense", drop_path_rate=0.11)
    rates = [block.drop_path for block in calls_of(DenseBlock, model, train=True)]
    assert rates == pytest.approx([0] * 3 + [0.01] * 6 + [0.02] * 6 + [0.03] * 4)


def test_dropout_acts_in_training_alone():
    variables, images = random_variables(little()), random_images(2, 32, 32)
    logits, first, second = (
        apply(little(), variables, images, seed, train=train) for seed, train in ((0, False), (0, True), (1, True))
    )
    assert golden.relative_error(first, logits) > 0.01  # by the performer's 0.1
    assert golden.relative_error(first, second) > 0.01
    for block in (Block, SEBlock, GhostBlock):
        model = little(block=block, drop_rate=0.3, attn_drop_rate=0.2)
        assert [drop.rate for drop in calls_of(nn.Dropout, model, train=False)] == [0] * 13
        rates = [drop.rate for drop in calls_of(nn.Dropout, model, train=True)]
        assert rates == [0.1] * 4 + [0.3] + [0.2, 0.3, 0.3, 0.3] * 2


def test_initialisation():
    """Official `_init_weights`: Linear and class token normal .02; convolutions as PyTorch makes them."""
    images = jnp.zeros((1, 16, 16, 3))
    models = {"performer": {}, "ghost": {"block": GhostBlock}, "convolution": {"tokens_type": "convolution"}}
    for kind, fields in models.items():
        variables = quick_jit(create_model("t2t_vit_micro", **fields).init)(jax.random.key(0), images)
        uniform = 0
        for path, x in traverse_util.flatten_dict(variables["params"], sep="/").items():
            module, leaf = path.rsplit("/", 1) if "/" in path else ("", path)
            kernel = variables["params"]
            for part in module.split("/") if module else ():
                kernel = kernel[part]
            kernel = kernel.get("kernel", x) if isinstance(kernel, dict) else x
            if kernel.ndim in (3, 4) and leaf in ("kernel", "bias"):
                uniform += 1
                bound = kernel[..., 0].size ** -0.5
                error = 6 / np.sqrt(2 * x.size)
                assert np.std(x) == pytest.approx(bound / 3**0.5, rel=error), path
                assert np.max(np.abs(x)) <= bound, path
            elif leaf == "scale":
                assert np.all(x == 1), path
            elif leaf == "bias":
                assert np.all(x == 0), path
            else:
                assert np.std(x) == pytest.approx(0.02, rel=6 / np.sqrt(2 * x.size)), path
                assert abs(np.mean(x)) < 6 * 0.02 / np.sqrt(x.size), path
        assert uniform == {"performer": 0, "ghost": 2 * 5, "convolution": 2 * 3}[kind]
        if kind == "performer":
            first, second = (variables["constants"]["tokens_to_token"][f"attention{i}"]["w"] for i in (1, 2))
            np.testing.assert_allclose(first @ first.T, 32 * np.eye(32), atol=1e-4)
            assert np.abs(first - second).max() > 0.1
