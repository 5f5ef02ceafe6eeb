"""The contract of a backbone: over every named network in shapes, over a narrow one of every kind in numbers."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import golden
from harness import (
    NARROW,
    apply,
    cubic_matrix,
    linear_matrix,
    modules_called,
    random_images,
    random_variables,
    shapes_of,
)
from vitpyramid.models.attention import Block
from vitpyramid.models.layers import DropPath
from vitpyramid.models.registry import create_model, get_variant, list_models
from vitpyramid.models.stack import is_stacked, stack_blocks, unstack_blocks
from vitpyramid.train.optim import decay_mask
from vitpyramid.weights import flax_to_torch, torch_to_flax
from vitpyramid.weights.names import is_behind

SIZES = [(224, 224), (192, 256), (225, 225), (200, 232), (256, 832), (384, 384), (448, 448), (100, 167), (32, 47)]
named = pytest.mark.parametrize("name", list_models())
narrow = pytest.mark.parametrize("kind", NARROW)


def flat(tree) -> dict:
    return traverse_util.flatten_dict(tree, sep="/")


variables_of = functools.cache(lambda name: shapes_of(create_model(name)))
random_of = functools.cache(lambda kind: random_variables(NARROW[kind]))


@named
def test_parameters_are_as_published_and_weights_go_both_ways(name):
    variables, variant = variables_of(name), get_variant(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == variant.params
    rng = np.random.default_rng(0)
    integers = jax.tree.map(lambda leaf: rng.integers(-99, 99, leaf.shape, np.int8), variables)
    state_dict = flax_to_torch(name, integers)
    jax.tree.map(np.testing.assert_array_equal, torch_to_flax(name, state_dict), integers)
    if name in golden.manifest():
        entry = golden.manifest()[name]
        assert entry["parameters"] == variant.params
        omitted = 0.15 if name.startswith("rest") else 0.06  # ResT's figures are without part of the attention products
        assert entry["macs"] / 1e9 == pytest.approx(variant.gmacs, rel=omitted)
        assert {key: list(array.shape) for key, array in state_dict.items()} == entry["state_dict"]


@named
def test_stages_hold_every_parameter_once(name):
    model = create_model(name)
    declared = [*model.after, *(path for stage in model.stages for path in (*stage.before, *stage.blocks))]
    owners = {
        path: [part for part in declared if f"{path}/".startswith(f"{part}/")]
        for path in flat(variables_of(name)["params"])
    }
    assert not {path: found for path, found in owners.items() if len(found) != 1}
    assert set(declared) - {found[0] for found in owners.values()} <= {"head_dist"}


@named
def test_families_are_told_apart_by_their_signatures(name):
    model, params = create_model(name), flat(variables_of(name)["params"])
    assert {other for other in list_models() if create_model(other).signature in params} == {
        other for other in list_models() if create_model(other).signature == model.signature
    }


@named
def test_position_tables_are_of_the_image_size(name):
    model = create_model(name)
    shapes = {path: leaf.shape for path, leaf in flat(variables_of(name)).items()}
    assert [table.path for table in model.position_tables] == [path for path in shapes if "/pos_embed" in path]
    for table in model.position_tables:
        rows = shapes[table.path][1:-1]
        assert rows in (table.grid, (table.extra + table.grid[0] * table.grid[1],))
    assert model.native_side(shapes) == (model.image_size if model.position_tables else None)


@named
def test_vectors_and_what_the_family_spares_are_not_decayed(name):
    model, params = create_model(name), variables_of(name)["params"]
    mask = flat(decay_mask(params, model.no_weight_decay))
    for path, leaf in flat(params).items():
        assert mask[path] == (leaf.ndim > 1 and path.split("/")[-1] not in model.no_weight_decay), path
    assert all(any(path.endswith(last) for path in mask) for last in model.no_weight_decay)


@narrow
def test_levels_in_bfloat16(kind):
    model = NARROW[kind].clone(dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.bfloat16)
    levels = jax.eval_shape(functools.partial(model.apply, method="features"), shapes_of(model), images)
    assert tuple(level.stride for level in levels) == model.strides == tuple(sorted(set(model.strides)))
    assert tuple(level.x.shape[-1] for level in levels) == model.level_dims
    assert all(level.x.dtype == jnp.bfloat16 and level.x.shape[0] == 2 for level in levels)
    logits = jax.eval_shape(model.apply, shapes_of(model), images)
    assert (logits.shape, logits.dtype) == ((2, model.num_classes), jnp.float32)


def halved(side: int, times: int) -> int:
    return side if times == 0 else halved((side + 1) // 2, times - 1)


# Sides of the levels' grids.
GRIDS = {
    "pvt": lambda side: [side // stride for stride in (4, 8, 16, 32)],
    "pit": lambda side: [halved((side - 16) // 8 + 1, times) for times in range(3)],
    "t2t": lambda side: [-(-(side - 2) // 16)],
    "rest": lambda side: [halved(side, times) for times in (2, 3, 4, 5)],
    "deit": lambda side: [side // 16],
    "regnety": lambda side: [halved(side, times) for times in (2, 3, 4, 5)],
}


@pytest.mark.parametrize("kind", [*GRIDS, "t2t_transformer", "t2t_convolution", "t2t_dense"])
def test_the_number_of_images_may_be_left_open(kind):
    """As an export does."""
    model, (batch,) = NARROW[kind], jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.float32)
    assert jax.eval_shape(model.apply, shapes_of(model), images).shape == (batch, 5)


@pytest.mark.parametrize("kind", GRIDS)
def test_what_features_read_is_what_stands_before_the_end(kind):
    model = NARROW[kind]
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    read = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, method="features"), images)
    paths = traverse_util.flatten_dict(shapes_of(model))
    assert traverse_util.flatten_dict(read).keys() == {path for path in paths if not is_behind(model, path)}


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_at_any_size(kind):
    model, sides = NARROW[kind], GRIDS[kind]
    for height, width in SIZES:
        images = jax.ShapeDtypeStruct((3, height, width, 3), jnp.float32)
        levels = jax.eval_shape(functools.partial(model.apply, method="features"), shapes_of(model), images)
        expected = list(zip(sides(height), sides(width), strict=True))
        assert [level.x.shape[1:3] for level in levels] == expected, (height, width)


@pytest.mark.parametrize("kind", GRIDS)
def test_images_too_small_or_without_batch_are_refused(kind):
    model = NARROW[kind]
    least = model.least_side
    assert least == {"pvt": 32, "pit": 16, "t2t": 3, "deit": 16}.get(kind, 1)
    for shape in [(1, least - 1, 64, 3), (1, 64, least - 1, 3), (64, 64, 3)]:
        message = f"images have shape {shape}, expected [B, H, W, 3] with H and W at least {least}"
        with pytest.raises(ValueError, match=re.escape(message)):
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("kind", [kind for kind in NARROW if NARROW[kind].position_tables])
def test_native_side_is_the_inverse_of_the_image_size(kind):
    for side in (64, 96, 160):
        shapes = {path: leaf.shape for path, leaf in flat(shapes_of(NARROW[kind].clone(image_size=side))).items()}
        assert NARROW[kind].native_side(shapes) == side
    path = NARROW[kind].position_tables[0].path
    assert NARROW[kind].native_side({}) is None
    for rows in (0, 7, 200):
        assert NARROW[kind].native_side({path: (1, rows, 8)}) is None


@pytest.mark.parametrize("kind", ["pvt", "pit", "deit", "deit_distilled"])
@pytest.mark.parametrize("size", [(225, 225), (448, 448), (224, 896), (100, 167), (32, 47)])
def test_any_size_equals_tables_resized_by_hand(kind, size):
    # 448 x 448 and 224 x 896 have 3136 tokens in PVT's stage 2, where the official code fails.
    model = NARROW[kind].clone(image_size=(224, 160))
    variables, images = flat(random_variables(model)), random_images(1, *size)
    by_hand = dict(variables)
    matrix = linear_matrix if kind == "pvt" else cubic_matrix
    for table, new in zip(model.position_tables, model.clone(image_size=size).position_tables, strict=True):
        rows, columns = (matrix(*sides) for sides in zip(table.grid, new.grid, strict=True))
        values = variables[table.path]
        cells = values.reshape(-1, values.shape[-1])[table.extra :].reshape(*table.grid, -1)
        cells = np.einsum("ph,qw,hwc->pqc", rows, columns, cells, optimize=True)
        if values.ndim == 3:
            cells = np.concatenate([values[0, : table.extra], cells.reshape(-1, cells.shape[-1])])
        by_hand[table.path] = cells[None].astype(np.float32)
    unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")
    levels = apply(model, unflatten(variables), images, method="features")
    expected = apply(model.clone(image_size=size), unflatten(by_hand), images, method="features")
    for level, right in zip(levels, expected, strict=True):
        assert golden.relative_error(level.x, right.x) < 1e-5


@pytest.mark.parametrize(
    "kind, size, used", [("pvt", (71, 95), (68, 92)), ("pit", (71, 70), (64, 64)), ("deit", (71, 79), (64, 64))]
)
def test_rows_and_columns_beyond_a_patch_are_dropped(kind, size, used):
    images = random_images(2, *size)
    logits = apply(NARROW[kind], random_of(kind), images)
    cropped = apply(NARROW[kind], random_of(kind), images[:, : used[0], : used[1]])
    np.testing.assert_allclose(logits, cropped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pit_distilled", "deit_distilled"])
def test_distilled_gives_two_logits_in_training_and_their_mean_otherwise(kind):
    model, variables, images = NARROW[kind], random_of(kind), random_images(3, 64, 64)
    class_logits, distill_logits = apply(model, variables, images, train=True)
    assert class_logits.shape == distill_logits.shape == (3, 5)
    assert golden.relative_error(class_logits, distill_logits) > 0.1
    mean = apply(model, variables, images)
    np.testing.assert_allclose(mean, (class_logits + distill_logits) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(model, variables, images[1:2]), mean[1:2], rtol=1e-4, atol=1e-5)

    changed = jax.tree.map(np.array, variables)
    changed["params"]["head_dist"]["bias"] += 1
    changed_class, changed_distill = apply(model, changed, images, train=True)
    np.testing.assert_array_equal(changed_class, class_logits)
    np.testing.assert_allclose(changed_distill, distill_logits + 1, rtol=1e-5, atol=1e-5)


# Recomputed: blocks, which a dense network's transition is not, and the attention layers of tokens-to-token.
TOKEN_LAYERS = {"t2t": 2, "t2t_transformer": 2, "t2t_se": 2, "t2t_ghost": 2, "t2t_dense": 2 - 1}


@narrow
def test_gradient_reaches_every_parameter_and_recomputing_changes_nothing(kind):
    variables, images = dict(random_of(kind)), random_images(4, 64, 64)
    params = variables.pop("params")
    model = NARROW[kind].clone(drop_rate=0.1, drop_path_rate=0.0 if kind == "regnety" else 0.3)

    def loss(params, remat):
        options = {"train": True, "rngs": {"dropout": jax.random.key(2)}, "mutable": list(variables)}
        logits, updated = model.clone(remat=remat).apply({"params": params, **variables}, images, **options)
        return sum(jnp.sum(jnp.sin(head)) for head in jax.tree.leaves(logits)), updated

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    traced = [step.trace(params, remat) for remat in (False, True)]
    blocks = sum(len(stage.blocks) for stage in model.stages)
    assert [str(program.jaxpr).count("remat2[") for program in traced] == [0, blocks + TOKEN_LAYERS.get(kind, 0)]
    result = jax.device_get(traced[True].lower().compile()(params))
    for path, gradient in flat(result[1]).items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
    if kind in GRIDS or kind == "t2t_dense":
        plain = jax.device_get(traced[False].lower().compile()(params))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[1]))
        chex.assert_trees_all_close(plain, result, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("kind", sorted(set(NARROW) - {"regnety", "t2t_dense"}))
def test_scanned_blocks_are_the_same_blocks(kind):
    model, variables, images = NARROW[kind], random_of(kind), random_images(2, 64, 64)
    scanned = model.clone(remat=True, scan=True)
    stacked = {**variables, "params": stack_blocks(variables["params"], model.stages)}
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(scanned))
    assert {path for path in flat(stacked["params"]) if not is_stacked(path, model.stages)} == {
        path
        for path in flat(variables["params"])
        if not any(path.startswith(f"{block}/") for stage in model.stages for block in stage.blocks)
    }
    unstacked = unstack_blocks(stacked["params"], model.stages)
    chex.assert_trees_all_equal(jax.device_get(unstacked), variables["params"])
    logits = apply(scanned, stacked, images)
    np.testing.assert_allclose(logits, apply(model, variables, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["regnety", "t2t_dense"])
def test_blocks_that_differ_are_not_scanned(kind):
    model = NARROW[kind].clone(remat=True, scan=True)
    with pytest.raises(ValueError, match="scan=True.*expected False"):
        shapes_of(model)
    with pytest.raises(ValueError, match="differ in shape and cannot be stacked"):
        stack_blocks(random_of(kind)["params"], model.stages)


# What sets the scale of the residual streams.
LARGE = {
    "pvt": "pos_embed|cls_token",
    "pit": "pos_embed|cls_token",
    "t2t": "cls_token|(project|proj|mlp_2|fc2|dense_linear|soft_split0|kqv|qkv|q|k|v)/",
    "rest": "stem/conv3/kernel|patch_embedding_[234]/norm/scale",
    "deit": "pos_embed|cls_token|dist_token",
    "regnety": "conv3/bn/scale|downsample/bn/scale",
}


@pytest.mark.parametrize("kind", [*GRIDS, "t2t_transformer", "t2t_dense"])
def test_bfloat16_is_close_and_finite_at_large_activations(kind):
    variables, images = random_of(kind), random_images(4, 64, 64)
    half = NARROW[kind].clone(dtype=jnp.bfloat16)
    logits, half_logits = (apply(model, variables, images) for model in (NARROW[kind], half))
    assert half_logits.dtype == jnp.float32
    assert 1e-5 < golden.relative_error(half_logits, logits) < (0.2 if kind == "rest" else 0.1)

    def enlarge(path, leaf):
        large = re.search(LARGE[kind.split("_")[0]], jax.tree_util.keystr(path, simple=True, separator="/"))
        return 1000 * leaf if large else leaf

    params = jax.tree_util.tree_map_with_path(enlarge, variables["params"])
    others = {key: value for key, value in variables.items() if key != "params"}

    def loss(params):
        options = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": [*others, "intermediates"]}
        options["capture_intermediates"] = lambda _, method: method == "encode"
        logits, state = half.apply({"params": params, **others}, 1000 * images, **options)
        ((levels, _),) = state["intermediates"]["encode"]
        return sum(jnp.sum(jnp.sin(head)) for head in jax.tree.leaves(logits)), (logits, levels)

    (_, (logits, levels)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert all(np.abs(np.float32(level.x)).max() > 100 for level in levels)
    leaves = jax.tree.leaves((logits, gradient))
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in leaves)


# Attention maps of two images of 64 x 96: heads, queries and keys.
SOWN = {
    "pvt": {"block1_0": (1, 384, 6), "block2_0": (2, 96, 6), "block3_1": (3, 24, 6), "block4_0": (4, 7, 7)},
    "pit_distilled": {  # two class tokens and 7 x 11, 4 x 6, 2 x 3
        "transformers_0/blocks_0": (1, 79, 79),
        "transformers_1/blocks_1": (2, 26, 26),
        "transformers_2/blocks_0": (4, 8, 8),
    },
    "t2t_transformer": {
        "tokens_to_token/attention1": (1, 384, 384),
        "tokens_to_token/attention2": (1, 96, 96),
        "blocks_0": (2, 25, 25),
        "blocks_1": (2, 25, 25),
    },
    "t2t_se": {"tokens_to_token/attention1": (1, 384, 384), "blocks_1": (2, 25, 25)},
    "t2t_ghost": {"blocks_1": (2, 25, 25)},
    "rest": {"stage1_0": (1, 384, 6), "stage2_0": (2, 96, 6), "stage3_1": (3, 24, 6), "stage4_0": (4, 6, 6)},
    "deit_distilled": {"blocks_0": (3, 26, 26), "blocks_2": (3, 26, 26)},
}


@pytest.mark.parametrize("kind", SOWN)
def test_attention_maps_are_sown(kind):
    run = jax.jit(functools.partial(NARROW[kind].apply, mutable="intermediates"))
    _, state = run(random_of(kind), random_images(2, 64, 96))
    maps = flat(state["intermediates"])
    for block, shape in SOWN[kind].items():
        (weights,) = maps.get(f"{block}/attn/attention") or maps[f"{block}/kernel_attention"]
        assert weights.shape == (2, *shape)
        normalised = kind == "rest" and block != "stage1_0"  # by an instance norm after the softmax
        np.testing.assert_allclose(weights.sum(-1), 0 if normalised else 1, rtol=1e-5, atol=2e-4)
        assert not normalised or np.all(np.var(weights, axis=(2, 3)) > 0.1)


# Of each block at a rate of 0.6.
DROP_PATHS = {
    "pvt": [0, 0.15, 0.3, 0.45, 0.6],
    "pit": [0, 0.15, 0.3, 0.45],  # block i of n: i / n
    "t2t": [0, 0.6],
    "t2t_se": [0, 0.6],
    "t2t_ghost": [0, 0.6],
    "t2t_dense": [0, 0.6 / 11, 0.6 / 11],  # a schedule of 12 entries, of which group g takes entry g
    "rest": [0, 0.15, 0.3, 0.45, 0.6],
    "deit": [0, 0.3, 0.6],
}
# Of dropout at a rate of 0.3: behind the positions, and in each block behind the projection and in the MLP.
DROPOUTS = {
    "pvt": [0.3] * (4 + 3 * 5),
    "pit": [0.3] * (1 + 3 * 4),
    "rest": [0.3] * (3 * 5),
    "deit": [0.3] * (1 + 3 * 3),
    "t2t_dense": [0.1] * 4 + [0.3] * (1 + 3 * 3),
    "regnety": [0.3],
}


@pytest.mark.parametrize("kind", DROP_PATHS)
def test_drop_path_grows_from_zero_over_all_blocks(kind):
    model, rates = NARROW[kind].clone(drop_path_rate=0.6), DROP_PATHS[kind]
    assert [block.drop_path for block in modules_called(Block, model, train=True)] == pytest.approx(rates)
    assert [path.rate for path in modules_called(DropPath, model, train=True)] == pytest.approx(np.repeat(rates, 2))
    assert [path.rate for path in modules_called(DropPath, model, train=False)] == [0] * 2 * len(rates)


@pytest.mark.parametrize("kind", [kind for kind in NARROW if "distilled" not in kind])
def test_dropout_has_its_rate_in_training_alone(kind):
    model = NARROW[kind].clone(drop_rate=0.3)
    rates = [drop.rate for drop in modules_called(nn.Dropout, model, train=True)]
    performer = [0.1] * 4 if kind in ("t2t", "t2t_se", "t2t_ghost") else [0.0] * 4 if "transformer" in kind else []
    assert rates == DROPOUTS.get(kind, performer + [0.3] * (1 + 3 * 2))
    drops = modules_called(nn.Dropout, model, train=False)
    assert [0 if drop.deterministic else drop.rate for drop in drops] == [0] * len(rates)


@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_what_is_dropped_follows_from_the_key(rate):
    variables, images = random_of("deit"), random_images(2, 64, 64)
    model = NARROW["deit"].clone(**{rate: 0.5})
    logits = apply(NARROW["deit"], variables, images)
    np.testing.assert_allclose(apply(model, variables, images), logits, rtol=1e-5, atol=1e-6)
    trained, again, other = (apply(model, variables, images, seed, train=True) for seed in (2, 2, 3))
    np.testing.assert_array_equal(trained, again)
    assert golden.relative_error(trained, logits) > 0.01
    assert golden.relative_error(trained, other) > 0.01


def test_each_branch_draws_anew():
    model = NARROW["deit"].clone(drop_path_rate=0.5)
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
    options["capture_intermediates"] = lambda module, _: isinstance(module, DropPath)
    _, state = jax.jit(functools.partial(model.apply, **options))(random_of("deit"), random_images(16, 32, 32))
    outputs = [branch for path, (branch,) in flat(state["intermediates"]).items() if "DropPath" in path]
    masks = [tuple(np.any(output, axis=(1, 2)).tolist()) for output in outputs]
    assert all(masks[0] + masks[1])  # the first block drops nothing
    assert len(set(masks[2:])) == len(masks[2:]) == 4
