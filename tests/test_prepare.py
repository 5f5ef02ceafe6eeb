"""Mixup, CutMix and erasing: the arithmetic by hand, the draws by their distribution, and that meshes agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from vitpyramid.tasks import prepare
from vitpyramid.train.sharding import batch_sharding, make_mesh

K = 5


def config_of(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return config


def batch_of(size=6, dtype=np.float32):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 12, 10, 3)).astype(dtype)
    targets = np.eye(K, dtype=np.float32)[rng.integers(0, K, size)] * 0.9 + 0.1 / K
    return images, targets


@pytest.mark.parametrize(
    ("mode", "mixup", "cutmix"),
    [("batch", 0.8, 1.0), ("pair", 0.8, 0.0), ("elem", 0.0, 1.0), ("elem", 0.8, 1.0), ("batch", 0.0, 0.7)],
)
def test_images_and_targets_are_mixed_alike(mode, mixup, cutmix, size=7):
    config = config_of(**{"mix.mixup": mixup, "mix.cutmix": cutmix, "mix.mode": mode}).mix
    images, targets = batch_of(size)
    draw = jax.jit(lambda key: prepare.draw_mix(key, size, 12, 10, config))
    mix_all = jax.jit(lambda key: prepare.mix(key, images, targets, config))
    for seed in range(4):
        key = jax.random.key(seed)
        weights, share = map(np.asarray, draw(key))
        mixed, mixed_targets = mix_all(key)
        np.testing.assert_allclose(share, weights.mean(axis=(1, 2)), atol=1e-6)
        partner = images[::-1]
        w = weights[..., None]
        np.testing.assert_allclose(mixed, w * images + (1 - w) * partner, rtol=1e-6, atol=1e-4)
        s = share[:, None]
        np.testing.assert_allclose(mixed_targets, s * targets + (1 - s) * targets[::-1], atol=1e-6)
        np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, rtol=1e-6)
        if mode != "elem":
            np.testing.assert_array_equal(weights, weights[::-1])
        if mode == "batch":
            assert len(np.unique(share)) == 1
        elif not cutmix:
            assert len(np.unique(share)) == (size if mode == "elem" else -(-size // 2))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_groups_are_mixed_by_themselves(mode):
    """Partners are of the same group, and groups draw independently."""
    config = config_of(**{"mix.mixup": 0.8, "mix.mode": mode, "mix.groups": 8}).mix
    images, targets = batch_of(24)
    key = jax.random.key(0)
    weights, share = map(np.asarray, prepare.draw_mix(key, 24, 12, 10, config))
    mixed, mixed_targets = prepare.mix(key, images, targets, config)
    for group in range(8):
        rows = slice(3 * group, 3 * group + 3)
        w, s = weights[rows, ..., None], share[rows, None]
        np.testing.assert_allclose(mixed[rows], w * images[rows] + (1 - w) * images[rows][::-1], rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(mixed_targets[rows], s * targets[rows] + (1 - s) * targets[rows][::-1], atol=1e-6)
        assert len(np.unique(share[rows])) == {"batch": 1, "pair": 2, "elem": 3}[mode]
        if mode != "elem":
            np.testing.assert_array_equal(weights[rows], weights[rows][::-1])
    assert len(np.unique(share)) == {"batch": 8, "pair": 16, "elem": 24}[mode]


@pytest.mark.parametrize("groups", [8, 16])
def test_groups_stay_on_their_devices(groups):
    """No row is sent between devices; with one group rows are."""

    def text(groups):
        config = config_of(**{"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.groups": groups}).mix
        rows = jax.device_put(batch_of(32), batch_sharding(make_mesh(2)))
        mix = jax.jit(lambda key, *rows: prepare.mix(key, *rows, config), out_shardings=rows[0].sharding)
        return mix.lower(jax.random.key(0), *rows).compile().as_text()

    moves = ("collective-permute", "all-to-all", "all-gather")
    assert not any(move in text(groups) for move in moves)
    assert any(move in text(1) for move in moves)


def test_pixels_are_rounded_when_they_are_not_normalised_yet():
    config = config_of(**{"mix.mixup": 0.8}).mix
    images, targets = batch_of(dtype=np.uint8)
    mixed, _ = prepare.mix(jax.random.key(0), images, targets, config)
    weights, _ = prepare.draw_mix(jax.random.key(0), 6, 12, 10, config)
    w = np.asarray(weights)[..., None]
    np.testing.assert_array_equal(mixed, np.rint(w * images + (1 - w) * images[::-1]))


def test_off_is_off():
    images, targets = batch_of()
    same, same_targets = prepare.mix(jax.random.key(0), images, targets, config_of().mix)
    assert same is images
    assert same_targets is targets
    assert prepare.erase(jax.random.key(0), images, config_of().erase) is images
    never = config_of(**{"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.prob": 0.0}).mix
    np.testing.assert_array_equal(prepare.mix(jax.random.key(0), images, targets, never)[0], images)


def draws(count, **changes):
    """Shares and weights of many independent draws."""
    config = config_of(**{"mix.mode": "elem", **changes}).mix
    weights, share = jax.jit(lambda key: prepare.draw_mix(key, count, 32, 32, config))(jax.random.key(3))
    return np.asarray(weights), np.asarray(share)


def test_distribution_of_mixup_and_of_the_switch():
    n = 20_000
    _, share = draws(n, **{"mix.mixup": 0.8})
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); 5 standard errors
    variance = 1 / (4 * 2.6)
    assert abs(share.mean() - 0.5) < 5 * np.sqrt(variance / n)
    assert abs(share.var() - variance) < 5 * variance * np.sqrt(2 / n)
    weights, _ = draws(4000, **{"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.switch_prob": 0.3})
    cut = ((weights == 0) | (weights == 1)).all(axis=(1, 2))
    assert abs(cut.mean() - 0.3) < 5 * np.sqrt(0.21 / 4000)
    weights, _ = draws(4000, **{"mix.mixup": 0.8, "mix.prob": 0.6})
    assert abs((weights != 1).any(axis=(1, 2)).mean() - 0.6) < 5 * np.sqrt(0.24 / 4000)


def test_distribution_of_cutmix_boxes():
    """timm's `rand_bbox` in numpy, the same number of draws: mean share and its spread agree within 5 errors."""
    n, rng = 4000, np.random.default_rng(0)
    weights, share = draws(n, **{"mix.cutmix": 1.0})
    expected = []
    for kept in rng.beta(1, 1, n):
        half = int(32 * np.sqrt(1 - kept)) // 2
        cy, cx = rng.integers(0, 32, 2)
        low, high = np.clip([cy - half, cx - half], 0, 32), np.clip([cy + half, cx + half], 0, 32)
        expected.append(1 - np.prod(high - low) / 32**2)
    assert abs(share.mean() - np.mean(expected)) < 5 * np.std(expected) * np.sqrt(2 / n)
    assert abs(share.std() / np.std(expected) - 1) < 5 / np.sqrt(n)
    for mask in 1 - weights[:50]:  # one rectangle each
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2


def test_distribution_of_erased_boxes():
    n = 4000
    boxes = prepare.draw_erased(jax.random.key(0), jnp.ones(n, int), 1, 224, 224)
    rows, columns = (np.asarray(boxes.bottom - boxes.top)[:, 0], np.asarray(boxes.right - boxes.left)[:, 0])
    area, aspect = rows * columns / 224**2, rows / columns
    assert area.min() > 0.018
    assert area.max() < 0.34
    # Uniform, but long boxes of large area do not fit: timm's loop in numpy says what is left.
    rng, expected = np.random.default_rng(0), []
    while len(expected) < n:
        drawn, ratio = rng.uniform(0.02, 1 / 3) * 224**2, np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(drawn * ratio)), round(np.sqrt(drawn / ratio))
        if h < 224 and w < 224:
            expected.append((h * w / 224**2, h / w))
    for found, right in zip(
        (area, np.log(aspect)), (np.array(expected)[:, 0], np.log(np.array(expected)[:, 1])), strict=True
    ):
        assert abs(found.mean() - right.mean()) < 5 * right.std() * np.sqrt(2 / n)
        assert abs(found.std() / right.std() - 1) < 5 / np.sqrt(n)
    assert (np.asarray(boxes.top) >= 0).all()
    assert (np.asarray(boxes.bottom) <= 224).all()
    assert (np.asarray(boxes.right) <= 224).all()


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
def test_erasing_fills_boxes(mode, count):
    config = config_of(**{"erase.prob": 0.4, "erase.mode": mode, "erase.count": count}).erase
    images = np.full((600, 32, 32, 3), 9, np.float32)
    erased = np.asarray(jax.jit(lambda key, x: prepare.erase(key, x, config))(jax.random.key(1), images))
    inside = (erased != 9).all(axis=-1)
    np.testing.assert_array_equal(inside, (erased != 9).any(axis=-1))
    touched = inside.any(axis=(1, 2))
    assert abs(touched.mean() - 0.4) < 5 * np.sqrt(0.24 / 600)
    values = erased[inside]
    if mode == "const":
        assert (values == 0).all()
        return
    assert abs(values.mean()) < 0.2
    assert abs(values.std() - 1) < 0.15
    colours = [len(np.unique(image[where], axis=0)) for image, where in zip(erased, inside, strict=True) if where.any()]
    if mode == "rand":
        assert max(colours) <= count
        assert (max(colours) > 1) == (count > 1)
    else:
        assert np.median(colours) > 15


def test_any_mesh_makes_the_same_batch():
    config = config_of(**{"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.mode": "elem", "erase.prob": 0.5})
    images, targets = batch_of(16)

    def mix_and_erase(key, images, targets):
        images, targets = prepare.mix(key, images, targets, config.mix)
        return prepare.erase(key, images, config.erase), targets

    expected = jax.jit(mix_and_erase)(jax.random.key(0), images, targets)
    split = jax.device_put((images, targets), batch_sharding(make_mesh(2)))
    found = jax.jit(mix_and_erase)(jax.random.key(0), *split)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_each_device_lays_out_its_own_images():
    """The layout is asked for of a device's rows: of the whole batch, slices of TPUs would gather it for that."""
    mesh = make_mesh(1)
    images = jax.ShapeDtypeStruct((16, 12, 10, 3), jnp.bfloat16, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(prepare.planar).trace(images).lower(lowering_platforms=("tpu",)).as_text()
    (line,) = (line for line in text.splitlines() if "LayoutConstraint" in line)
    assert "tensor<2x12x10x3xbf16>" in line
