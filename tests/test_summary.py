"""Sizes and costs of networks against the official code's, and the command that prints them."""

import dataclasses
import functools
import runpy
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from vitpyramid.heads.registry import FACTS
from vitpyramid.models.backbone import Level
from vitpyramid.models.pvt import PVT
from vitpyramid.models.registry import create_model, get_variant
from vitpyramid.models.rest import ResT
from vitpyramid.tools import summary
from vitpyramid.tools.summary import Summary, count_macs, main, stored_bytes, summarise, table


def shapes_of(model, side=224):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


class Layers(nn.Module):
    """A network given as a function of the images and of weights `[7, 7]`, which has one level of stride 1."""

    function: callable

    @nn.compact
    def __call__(self, images, train=False):
        return self.function(images, self.param("w", nn.initializers.ones, (7, 7)))

    def features(self, images, train=False):
        return self(images)


def macs_of(function) -> int:
    """Counted for an image of 7 x 7."""
    model = Layers(function)
    return count_macs(model, shapes_of(model, 7), 7, 7)


@pytest.mark.parametrize("name", golden.manifest())
def test_counts_are_those_of_the_official_code(name):
    model, entry = create_model(name), golden.manifest()[name]
    variables = shapes_of(model)
    assert count_macs(model, variables, 224, 224) == entry["macs"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(variables.get("constants", {})))
    sizes = {key: int(np.prod(shape)) for key, shape in entry["state_dict"].items()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert parameters + frozen == sum(size for key, size in sizes.items() if not key.endswith(statistics))
    assert parameters == entry["parameters"] == get_variant(name).params


@pytest.mark.parametrize("name", ["pvt_tiny", "rest_lite"])
def test_loops_and_recomputation_count_as_their_blocks_do(name):
    model = create_model(name, remat=True, scan=True)
    assert count_macs(model, shapes_of(model), 224, 224) == golden.manifest()[name]["macs"]


def test_products_of_every_kind_are_counted():
    image = 7 * 7 * 7  # a 7 x 7 matrix times another
    assert macs_of(lambda x, w: x[0, :, :, 0] @ w) == image
    assert macs_of(lambda x, w: x[0, :, :, 0] @ x[0, :, :, 1]) == image
    assert macs_of(lambda x, w: jnp.einsum("bhwc,hv->bvwc", x, w)) == 3 * image
    assert macs_of(jax.jit(lambda x, w: nn.gelu(x[0, :, :, 0] @ w))) == image
    assert macs_of(jax.checkpoint(lambda x, w: x[0, :, :, 0] @ w)) == image
    assert macs_of(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x[0, 0] * 0, lambda: w @ x[0, 0])) == 7 * 7 * 3
    loop = lambda x, w: jax.lax.scan(lambda carry, row: (carry @ w, row @ w), jnp.ones(7), x[0, :, :, 0])  # noqa: E731
    assert macs_of(loop) == 7 * 2 * (7 * 7)
    kernel = lambda w, groups: jnp.broadcast_to(w[:3, :3, None, None], (3, 3, 3 // groups, 6))  # noqa: E731
    for groups in (1, 3):
        convolve = lambda x, w, g=groups: jax.lax.conv_general_dilated(  # noqa: E731
            x,
            kernel(w, g),
            (2, 2),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=g,
        )
        assert macs_of(convolve) == 4 * 4 * 6 * 9 * 3 // groups


def test_products_that_are_no_layers_are_not_counted():
    constant = np.ones((7, 7), np.float32)
    assert macs_of(lambda x, w: x[0, :, :, 0] @ constant) == 0
    assert macs_of(lambda x, w: x * (w @ w)[0, 0]) == 0
    assert macs_of(lambda x, w: x[0, :, :, 0] * w) == 0
    assert macs_of(lambda x, w: jax.lax.while_loop(lambda n: n.sum() < 9, lambda n: n + 1, x)) == 0
    with pytest.raises(NotImplementedError, match="unknown length"):
        macs_of(lambda x, w: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ w, x[0, :, :, 0]))


def test_resizing_positions_costs_nothing():
    # Floored grids: 14 x 14, 7 x 7, 3 x 3 and 1 x 1, with or without a resize of the tables.
    built_for_it, resized = PVT((1, 1, 1, 1), image_size=57), PVT((1, 1, 1, 1), image_size=96)
    macs = count_macs(resized, shapes_of(resized), 57, 57)
    assert macs == count_macs(built_for_it, shapes_of(built_for_it), 57, 57) > 0


def stored_in_one_level(function, features=1) -> list[int]:
    """Stored bytes of `function(images, kernel)` for images of 8 x 8 and a kernel `[3, features]`."""

    class Network(nn.Module):
        @nn.compact
        def features(self, images, train):
            return (Level(function(images, self.param("kernel", nn.initializers.ones, (3, features))), 1),)

    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    init = functools.partial(Network().init, train=True, method="features")
    return stored_bytes(Network(), jax.eval_shape(init, jax.random.key(0), images), 8, 8)


def test_stored_bytes_are_those_of_the_residuals():
    channel = 4 * 8 * 8
    assert stored_in_one_level(lambda x, w: x @ w + 1) == [0]  # the images are given anyway
    assert stored_in_one_level(lambda x, w: jnp.sin(x @ w)) == [channel]  # the cosine
    assert stored_in_one_level(lambda x, w: jnp.sin(x @ w), 5) == [5 * channel]
    assert stored_in_one_level(lambda x, w: x @ jnp.sin(w)) == [0]  # depends on weights alone

    def product_of_views(x, w):
        y = x @ w
        flat = y.reshape(-1)
        return (flat * flat).reshape(y.shape) * y

    assert stored_in_one_level(product_of_views) == [2 * channel]  # y and its square


def test_stored_bytes_belong_to_their_stages():
    one, two = ResT((1, 1), (8, 16), (1, 2)), ResT((1, 2), (8, 16), (1, 2))
    sizes = [stored_bytes(model, shapes_of(model, 64), 64, 64) for model in (one, two)]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1] < 2 * sizes[0][1]
    model = one.clone(remat=True)
    recomputed = stored_bytes(model, shapes_of(model, 64), 64, 64)
    assert all(0 < less < more for less, more in zip(recomputed, sizes[0], strict=True))


def test_stored_bytes_grow_with_the_image():
    model = create_model("pvt_micro")
    small, large = (stored_bytes(model, shapes_of(model, 32), side, side) for side in (128, 256))
    assert all(b / a > 3.5 for a, b in zip(small, large, strict=True))


def test_summary_of_a_variant():
    found = summarise("pvt_tiny", 112, 448)
    assert dataclasses.astuple(found)[:8] == ("pvt_tiny", 112, 448, 13_229_288, 0, found.macs, None, 75.1)
    assert [dataclasses.astuple(level)[:4] for level in found.levels] == [
        (4, 28, 112, 64),
        (8, 14, 56, 128),
        (16, 7, 28, 320),
        (32, 3, 14, 512),
    ]
    assert found.stored == sum(level.stored for level in found.levels)
    # At least the output of each layer, in tokens of float32: fc1 is 8 times as wide as the tokens.
    assert found.levels[0].stored > 2 * 4 * (28 * 112) * 64 * (8 + 5)


def test_default_size_is_the_variants_own_and_published_figures_are_at_224():
    assert (found := summarise("rest_lite")).height == found.width == 224
    assert (found.published_gmacs, found.top1) == (1.4, 77.2)
    assert (found := summarise("rest_micro")).height == found.width == 32
    assert found.published_gmacs is None and found.reason == ""


def test_nothing_is_allocated():
    # One attention map of the first stage would be 128 GiB.
    before = {id(array) for array in jax.live_arrays()}
    found = summarise("pvt_tiny", 2**12 * 3, 2**12 * 3)
    assert found.stored > 2**37
    assert not any(array.size > 100 for array in jax.live_arrays() if id(array) not in before)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gmacs", "published"),
    [
        ("retinanet_pvt_small", (800, 1280), (23_971_328, 3_786_752, 6_463_220), 285.66, 285.8),
        ("mask_rcnn_pvt_small", (800, 1280), (23_971_328, 2_623_488, 593_935, 16_949_985), 304.22, 304.4),
        ("semantic_fpn_pvt_tiny", (None, None), None, 33.19, 33.2),
    ],
)
def test_detectors_have_the_published_sizes(name, size, parameters, gmacs, published):
    """Parameters by part are those of the network that mmdetection builds from PVT's configurations."""
    found = summary.summarise_dense(name, *size)
    assert found.parts[0].name == "backbone" and all(part.macs > 0 for part in found.parts)
    assert parameters in (None, tuple(part.parameters for part in found.parts))
    assert round(found.macs / 1e9, 2) == gmacs and found.published_gmacs == published
    assert found.parameters == FACTS[name].parameters and round(found.parameters / 1e6, 1) == found.published
    assert (found.height, found.width) == (size if size[0] else (512, 512))


def test_what_roi_align_multiplies_is_not_counted():
    def network(x, w):
        with jax.named_scope("resample"):
            moved = w @ x[0, :, :, 0]
        return (moved @ w)[None, :, :, None]

    assert macs_of(network) == 7 * 7 * 7


def dense_summary(height=800, width=1344, name="retinanet_pvt_small"):
    parts = (summary.Part("backbone", 2_000_000, int(2e9)), summary.Part("bbox_head", 345_678, int(1e9)))
    return summary.DenseSummary(name, height, width, parts, 2.3, 3.1, (8, 16, 32))


def test_detectors_are_described():
    assert summary.describe_dense(dense_summary()).splitlines() == [
        "retinanet_pvt_small for images of 800 x 1344",
        "parameters  2,345,678 (published 2.3 M)",
        "GMACs       3 (published 3.1 at 800x1280)",
        "strides     8/16/32",
        "",
        "part            parameters    GMACs",
        "backbone         2,000,000        2",
        "bbox_head          345,678        1",
    ]
    rows = [dense_summary(), dense_summary(800, 1280), dense_summary(512, 512, "semantic_fpn_pvt_tiny")]
    lines = summary.dense_table(rows, markdown=True).splitlines()
    assert lines[2] == "| retinanet_pvt_small | 800x1344 | 2,345,678 | 2.3 | 3 | 3.1 at 800x1280 | 8/16/32 |"
    assert [line.split(" | ")[5] for line in lines[3:]] == ["3.1", "3.1"]


def made_up(name: str, macs: float, published: float | None) -> Summary:
    level = summary.LevelSummary(4, 56, 56, 64, 3 * 2**20)
    return Summary(name, 224, 224, 12_345, 67, int(macs), published, None, (level,))


@pytest.mark.parametrize(
    "name, macs, published, reason",
    [
        ("pvt_tiny", 1.94e9, 1.9, ""),
        ("pvt_tiny", 1.94e9, None, ""),
        ("rest_lite", 1.53e9, 1.4, "the published figure omits part of the attention products"),
        ("t2t_vit_7", 1.147e9, 1.1, "the published figure is rounded"),
        ("pvt_tiny", 2.2e9, 1.9, "the published figure was counted with another tool"),
    ],
)
def test_differences_from_published_figures_have_a_reason(name, macs, published, reason):
    assert made_up(name, macs, published).reason == reason


def test_tables():
    summaries = [made_up("pvt_tiny", 1.94e9, 1.9), made_up("rest_lite", 1.53e9, 1.4), made_up("rest_small", 9e9, 1.9)]
    lines = table(summaries).splitlines()
    assert len(lines) == 4 + 2 and len(set(map(len, lines[:4]))) == 1
    assert lines[2].split() == ["rest_lite", "224x224", "12,345", "67", "1.53", "1.4", "[1]", "-", "4", "64", "3.0"]
    assert lines[5] == "[1] the published figure omits part of the attention products"
    lines = table(summaries, markdown=True).splitlines()
    assert lines[0].startswith("| model | image | parameters | frozen | GMACs | published |")
    assert lines[1] == "| --- | " + " | ".join(["---:"] * 9) + " |"
    assert lines[3] == "| rest_lite | 224x224 | 12,345 | 67 | 1.53 | 1.4 [1] | - | 4 | 64 | 3.0 |"
    assert lines[5:] == ["", "1. the published figure omits part of the attention products"]


def test_command_describes_a_model(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "vitpyramid.tools.summary")
    monkeypatch.setattr(sys, "argv", ["summary", "--model=rest_micro", "--size=64x93"])
    runpy.run_module("vitpyramid.tools.summary", run_name="__main__")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "rest_micro for images of 64 x 93" and not err
    assert lines[1] == f"parameters  {get_variant('rest_micro').params:,}"
    grids = [tuple(line.split()[:5]) for line in lines[-4:]]
    assert grids == [
        ("4", "16", "x", "24", "32"),
        ("8", "8", "x", "12", "64"),
        ("16", "4", "x", "6", "128"),
        ("32", "2", "x", "3", "256"),
    ]


def test_command_makes_a_table_of_detectors(monkeypatch, capsys):
    monkeypatch.setattr(summary, "list_models", lambda: ["pvt_micro", "retinanet_pvt_small"])
    monkeypatch.setattr(summary, "summarise", lambda name, *size: made_up(name, 1e9, None))
    monkeypatch.setattr(summary, "summarise_dense", lambda name, *size: dense_summary(name=name))
    main(["--all"])
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[1].startswith("pvt_micro ") and second.splitlines()[1].startswith("retinanet_pvt_small ")
    main(["--model=retinanet_pvt_small"])
    assert "backbone         2,000,000" in capsys.readouterr().out


def test_command_makes_a_table_of_all_models(monkeypatch, capsys):
    monkeypatch.setattr(summary, "list_models", lambda: ["rest_micro", "pvt_micro"])
    main(["--all", "--markdown", "--size=64"])
    out, err = capsys.readouterr()
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == ["| rest_micro", "| pvt_micro"]
    assert err.splitlines() == ["1/2 rest_micro", "2/2 pvt_micro"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=pvt_tinny"], "unknown model 'pvt_tinny'; expected one of list_models(), such as pvt_tiny"),
        (["--model=pvt_tiny", "--size=384,512"], "'384,512' is not a size, expected HEIGHTxWIDTH or SIDE"),
        (["--model=pvt_tiny", "--size=0x32"], "'0x32' is not a size"),
        (["--model=pvt_tiny", "--size=31"], "(1, 31, 31, 3), expected [B, H, W, 3] with H and W at least 32"),
        ([], "one of the arguments --model --all is required"),
        (["--model=pvt_tiny", "--all"], "not allowed with"),
        (["--model=pvt_tiny", "--markdown"], "expected --all"),
    ],
)
def test_command_refuses_what_makes_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
