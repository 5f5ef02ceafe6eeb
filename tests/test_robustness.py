"""Occlusions, attacks, corruptions, and the tool that measures accuracy under them."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.util
from PIL import Image

from vitpyramid.evals import attacks, corruptions, imagenet
from vitpyramid.models.registry import get_variant
from vitpyramid.tools import backgrounds
from vitpyramid.tools import robustness as tool
from vitpyramid.tools.network import Network

PHOTO = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((96, 64)))
KEYS = jax.vmap(jax.random.key)(jnp.arange(3))
MOTION = {
    33: [
        [102, 120, 161, 102, 174, 205],
        [54, 123, 131, 150, 95, 143],
        [93, 69, 46, 108, 87, 67],
        [69, 63, 57, 52, 48, 47],
    ],
    -40: [
        [86, 97, 111, 111, 168, 199],
        [98, 127, 74, 176, 166, 214],
        [139, 103, 117, 188, 211, 191],
        [68, 109, 145, 130, 110, 108],
    ],
}
WHITE = jnp.ones((3, 56, 84, 3))


def rng(seed=0):
    return np.random.default_rng(seed)


@functools.partial(jax.jit, static_argnums=0)
def occlude(kind, keys, images, ratio):
    return tool.OCCLUSIONS[kind](keys, images, ratio)


def test_centre_is_pits_occlusion():
    hidden = np.asarray(occlude("centre", KEYS[:1], jnp.ones((1, 224, 224, 3)), 0.25))
    expected = np.ones((1, 224, 224, 3))
    expected[:, 56:168, 56:168] = 0
    np.testing.assert_array_equal(hidden, expected)
    wide = np.asarray(occlude("centre", KEYS, WHITE, 0.25))
    assert (wide[:, 14:42, 21:63] == 0).all() and wide.mean() == 0.75


def test_boxes_lie_inside_and_differ():
    for ratio in (0.1, 0.5):
        hidden = 1 - np.asarray(occlude("box", KEYS, WHITE, ratio))[..., 0]
        tall, wide = round(56 * ratio**0.5), round(84 * ratio**0.5)
        places = set()
        for image in hidden:
            rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
            assert image.sum() == len(rows) * len(columns) == tall * wide
            places.add((rows[0], columns[0]))
        assert len(places) == 3
    np.testing.assert_array_equal(occlude("box", KEYS[1:], WHITE[1:], 0.5)[0], occlude("box", KEYS, WHITE, 0.5)[1])


def test_patches_are_whole_and_as_many_as_asked():
    hidden = 1 - np.asarray(occlude("patch", KEYS, WHITE, 0.3))[..., 0]
    parts = hidden.reshape(3, 14, 4, 14, 6).mean((2, 4))
    assert set(np.unique(parts)) == {0, 1}
    np.testing.assert_array_equal(parts.sum((1, 2)), round(0.3 * 196))
    assert (parts[0] != parts[1]).any()


def test_attacks_stay_within_eps_and_find_the_worst():
    weights = jnp.asarray(rng().standard_normal((8, 8, 3)))
    images = jnp.asarray(rng(1).uniform(size=(2, 8, 8, 3)))

    def loss(x):  # linear: the worst is known
        return (x * weights).sum()

    worst = jnp.clip(images + 0.1 * jnp.sign(weights), 0, 1)
    np.testing.assert_allclose(attacks.fgsm(loss, images, 0.1), worst)
    pgd = jax.jit(functools.partial(attacks.pgd, loss))
    for start in (None, KEYS[:2]):
        np.testing.assert_allclose(pgd(images, 0.1, 0.05, 4, start), worst, atol=1e-6)
    drawn = pgd(images, 0.1, 0.0, 1, KEYS[:2])
    assert 0.09 < jnp.abs(drawn - images).max() <= 0.1 + 1e-6
    assert ((drawn >= 0) & (drawn <= 1)).all()


def test_parameters_are_in_the_published_order_of_strength():
    for name, (_, parameters) in corruptions.CORRUPTIONS.items():
        assert len(parameters) == 5, name
    assert set(corruptions.CORRUPTIONS) == set(corruptions.ALEXNET)
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast"):
        apart = [
            np.abs(corruptions.corrupt(PHOTO, name, severity) - PHOTO.astype(float)).mean() for severity in range(1, 6)
        ]
        assert (np.diff(apart) > 0).all(), (name, apart)


def test_corruptions_are_functions_of_their_place():
    for name in corruptions.CORRUPTIONS:
        pictures = [PHOTO.repeat(2, 0).repeat(2, 1)] if name == "frost" else []
        once, again = (corruptions.corrupt(PHOTO, name, 3, index=4, pictures=pictures) for _ in range(2))
        assert once.shape == PHOTO.shape and once.dtype == np.uint8 and (once != PHOTO).any()
        np.testing.assert_array_equal(once, again)
        if name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):
            assert (corruptions.corrupt(PHOTO, name, 3, index=5, pictures=pictures) != once).any(), name
    with pytest.raises(ValueError, match="corruption 'rain' at severity 1: expected"):
        corruptions.corrupt(PHOTO, "rain", 1)
    with pytest.raises(ValueError, match=r"frost: expected pictures larger than \(64, 96\), got none"):
        corruptions.corrupt(PHOTO, "frost", 1)


def test_noise_has_the_distributions_that_it_should():
    grey = np.full((300, 300, 3), 0.5)
    noisy = corruptions.gaussian_noise(grey, rng(), 0.18)
    assert noisy.mean() == pytest.approx(0.5, abs=2e-3) and noisy.std() == pytest.approx(0.18, rel=0.01)
    shot = corruptions.shot_noise(grey, rng(), 12)
    assert shot.mean() == pytest.approx(0.5, abs=2e-3) and shot.var() == pytest.approx(0.5 / 12, rel=0.02)
    spots = corruptions.impulse_noise(grey, rng(), 0.17)
    theirs = skimage.util.random_noise(grey, "s&p", rng=0, amount=0.17)
    for value in (0, 1):
        assert (spots == value).mean() == pytest.approx((theirs == value).mean(), abs=2e-3)


def test_blurs_keep_what_is_even_and_spread_a_point():
    even, point = np.full((65, 65, 3), 0.4), np.zeros((65, 65, 3))
    point[32, 32] = 1
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"):
        blur, parameters = corruptions.CORRUPTIONS[name]
        # Glass works on 256 levels, rounded down.
        np.testing.assert_allclose(
            blur(even, rng(), *parameters[2]), 0.4, atol=1 / 255 if name == "glass_blur" else 1e-6
        )
    disk = corruptions.disk(6, 0.5)
    np.testing.assert_allclose(corruptions.defocus_blur(point, rng(), 6, 0.5)[24:41, 24:41, 0], disk, atol=1e-9)
    y, x = np.mgrid[-8:9, -8:9]
    inside = (x**2 + y**2 <= 36) / np.sum(x**2 + y**2 <= 36)
    np.testing.assert_allclose(corruptions.disk(6, 0.1), inside, atol=1e-12)
    np.testing.assert_allclose(disk, scipy.ndimage.gaussian_filter(inside, 0.5, radius=1), atol=1e-9)
    # Along the row, to the left of the point: it is read from the right of where it is written.
    line = corruptions._motion(point, 4, 2.0, 0.0)[32, 24:33, 0]
    half = np.exp(-(np.arange(9) ** 2) / 8)
    np.testing.assert_allclose(line[::-1], half / half.sum())
    down = corruptions._motion(point, 4, 2.0, 90.0)
    np.testing.assert_allclose(down[24:33, 32, 0], line)


def test_motion_is_imagemagicks():
    """`convert t.png -motion-blur 4x2+33`, and with -40, of ImageMagick 6.9.11, which cuts off fractions of a level."""
    y, x = np.mgrid[:4, :6]
    image = (37 * y * y + 91 * x + 53 * x * y) % 256 / 255
    for angle, expected in MOTION.items():
        found = 255 * corruptions._motion(image[..., None], 4, 2.0, angle)[..., 0]
        np.testing.assert_array_equal(np.floor(found + 1e-6), expected)


def test_zoom_is_scipys_on_a_square():
    square = PHOTO[:, :64] / 255
    expected = square.copy()
    factors = np.arange(1, 1.21, 0.02)
    for factor in factors:
        cut = int(np.ceil(64 / factor))
        top = (64 - cut) // 2
        large = scipy.ndimage.zoom(square[top : top + cut, top : top + cut], (factor, factor, 1), order=1)
        trim = (large.shape[0] - 64) // 2
        expected += large[trim : trim + 64, trim : trim + 64]
    np.testing.assert_allclose(corruptions.zoom_blur(square, rng(), 1.21, 0.02), expected / (len(factors) + 1))


def test_brightness_is_that_of_hsv():
    x = PHOTO / 255
    x[:4] = 0
    hsv = skimage.color.rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    np.testing.assert_allclose(corruptions.brightness(x, rng(), 0.3), skimage.color.hsv2rgb(hsv), atol=1e-12)


def test_contrast_fog_and_glass_by_their_formulas():
    x = PHOTO / 255
    np.testing.assert_allclose(corruptions.contrast(x, rng(), 0.2), 0.2 * x + 0.8 * x.mean((0, 1)))
    cloud = corruptions.plasma(128, 2.0, rng())
    assert cloud.shape == (128, 128) and cloud.min() == 0 and cloud.max() == 1
    expected = (x + 2.5 * cloud[:64, :96, None]) * x.max() / (x.max() + 2.5)
    np.testing.assert_allclose(corruptions.fog(x, rng(), 2.5, 2.0), expected)
    # A slower decay has more of the fine waves.
    rough = [np.abs(np.diff(corruptions.plasma(128, decay, rng()), axis=0)).mean() for decay in (1.4, 3.0)]
    assert rough[0] > 2 * rough[1]
    pixels = rng().integers(0, 256, (12, 12, 3), np.uint8)
    shifts = rng(1).integers(-2, 2, (2, 12, 12, 2))
    expected = pixels.copy()
    for i in range(2):
        for h in range(12 - 2, 2, -1):
            for w in range(12 - 2, 2, -1):
                dx, dy = shifts[i, h, w]
                h2, w2 = h + dy, w + dx
                expected[h, w], expected[h2, w2] = expected[h2, w2], expected[h, w]
    np.testing.assert_array_equal(corruptions._shuffle(pixels.copy(), shifts, 2), expected)


def test_elastic_moves_corners_and_keeps_an_image_in_place():
    x = PHOTO / 255
    np.testing.assert_allclose(corruptions._affine(x, rng(), 0.0), x, atol=1e-9)
    np.testing.assert_allclose(corruptions.elastic_transform(x, rng(), 0.0, 0.01, 0.0), x, atol=1e-9)
    ramp = np.mgrid[:64, :64].transpose(1, 2, 0)[..., ::-1].astype(float)  # x, y
    moved = corruptions._affine(ramp, rng(3), 5.0)
    shift = rng(3).uniform(-5, 5, (3, 2))
    centre = np.array([32, 32])
    for corner, by in zip([centre + 21, [centre[0] + 21, centre[1] - 21], centre - 21], shift, strict=True):
        column, row = corner + by
        found = [scipy.ndimage.map_coordinates(moved[..., c], [[row], [column]], order=1)[0] for c in (0, 1)]
        np.testing.assert_allclose(found, corner, atol=1e-6)


def test_mce():
    errors = {name: [rate] * 5 for name, rate in corruptions.ALEXNET.items()}
    assert corruptions.mce(errors) == pytest.approx(100)
    errors["fog"] = [0.5 * corruptions.ALEXNET["fog"] * severity / 3 for severity in range(1, 6)]
    assert corruptions.corruption_errors(errors)["fog"] == pytest.approx(50)
    assert corruptions.mce(errors) == pytest.approx(100 - 50 / 15)
    del errors["frost"]
    assert corruptions.mce(errors) is None


def test_classes_of_other_data_sets():
    synsets = imagenet.synsets()
    assert len(synsets) == 1000 and list(synsets) == sorted(synsets)
    assert (synsets[0], synsets[281], synsets[999]) == ("n01440764", "n02123045", "n15075141")
    np.testing.assert_array_equal(imagenet.model_classes(["n02123045", "n01440764"], 1000), [281, 0])
    v2 = sorted(str(k) for k in range(1000))  # as folders are listed: "0", "1", "10", "100", ...
    np.testing.assert_array_equal(imagenet.model_classes(v2, 1000)[:4], [0, 1, 10, 100])
    np.testing.assert_array_equal(imagenet.model_classes(["cat", "dog"], 2), [0, 1])
    np.testing.assert_array_equal(imagenet.model_classes(["1", "2"], 2), [0, 1])  # 2 is no class: names
    with pytest.raises(ValueError, match="2 classes, cat, dog ...: expected the 10 of the model"):
        imagenet.model_classes(["cat", "dog"], 10)
    with pytest.raises(ValueError, match="classes n00000000: expected WordNet ids"):
        imagenet.model_classes(["n00000000"], 1000)
    assert imagenet.real_number("/x/n01440764/ILSVRC2012_val_00000293.JPEG") == 292
    with pytest.raises(ValueError, match=r"expected a file called ILSVRC2012_val"):
        imagenet.real_number("cat.jpg")


class Linear(nn.Module):
    """Compiled at once, and sure to fall to an attack."""

    num_classes: int = 10
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def network():
    model = Linear()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return Network("linear", model, variables, get_variant("pvt_micro"), (32, 32))


@pytest.fixture(scope="module")
def measured(network):
    """Twelve images whose labels are what the network says of them, in batches of 8: the last one is padded."""
    pixels = rng().integers(0, 256, (12, 32, 32, 3), np.uint8)
    logits = network.model.apply(network.variables, network.inputs(pixels))
    labels = tool.Labels(np.eye(10, dtype=bool)[np.argmax(logits, 1)], np.ones(10, bool))
    settings = tool.Settings(batch=8, steps=3, ratios=(0.5,), eps=(1.0, 8.0), corruptions=("contrast",))
    return pixels, labels, settings, tool.robustness(network, pixels.__getitem__, labels, settings)


def test_accuracies(network, measured):
    pixels, labels, settings, report = measured
    assert (report["images"], report["clean"]) == (12, 100)
    assert report["pgd"]["8"] <= report["fgsm"]["1"] <= 100
    assert report["pgd"]["8"] < 100 and report["fgsm"]["8"] < 100
    occluded = occlude("centre", None, pixels, 0.5)
    predicted = np.argmax(network.model.apply(network.variables, network.inputs(occluded)), 1)
    right = labels.accepted[np.arange(12), predicted].mean()
    assert report["occlusion"]["centre"]["0.5"] == pytest.approx(100 * right)
    for severity, percent in enumerate(report["corruptions"]["contrast"], start=1):
        corrupted = [corruptions.corrupt(p, "contrast", severity, index=i) for i, p in enumerate(pixels)]
        predicted = np.argmax(network.model.apply(network.variables, network.inputs(np.stack(corrupted))), 1)
        assert percent == pytest.approx(100 * labels.accepted[np.arange(12), predicted].mean())
    assert report["mce"] is None
    page = tool.robustness_chart(report)
    assert page.size == (3 * 520, 320)
    assert tool.corruptions_picture(pixels[0], settings).size == (2 * 132 + 4, 128 + 14 + 4 + 22)
    lines = list(tool.describe(report))
    assert lines[0].startswith("clean") and "no mCE without gaussian_noise" in lines[-1]


def test_labels_of_several_kinds(network, measured, tmp_path):
    pixels, labels, settings, _ = measured
    only_clean = tool.Settings(tests=("clean",), batch=8)
    # Each image right by one of two labels, and two that do not count.
    accepted = labels.accepted | np.roll(labels.accepted, 1, axis=1)
    accepted[:2] = False
    report = tool.robustness(network, pixels.__getitem__, tool.Labels(accepted, labels.subset), only_clean)
    assert (report["images"], report["clean"]) == (10, 100)
    with pytest.raises(ValueError, match="fgsm, pgd: expected images with one label each"):
        tool.robustness(network, pixels.__getitem__, tool.Labels(accepted, labels.subset), settings)
    with pytest.raises(ValueError, match="no image has a label that counts"):
        tool.robustness(network, pixels.__getitem__, tool.Labels(accepted[:2], labels.subset), only_clean)
    # Among classes without the winning ones.
    subset = ~labels.accepted.any(0)
    assert tool.robustness(network, pixels.__getitem__, tool.Labels(labels.accepted, subset), only_clean)["clean"] == 0


def test_data_and_labels(tmp_path):
    for name in ("n02123045", "n01440764"):
        (tmp_path / "a" / name).mkdir(parents=True)
        Image.fromarray(PHOTO).save(tmp_path / "a" / name / "ILSVRC2012_val_00000002.png")
    (tmp_path / "a" / "n02123045" / "ILSVRC2012_val_00000001.png").write_bytes(
        (tmp_path / "a" / "n02123045" / "ILSVRC2012_val_00000002.png").read_bytes()
    )
    for source in (tool.open_data(str(tmp_path), "a"), tool.open_data(str(tmp_path / "a"), "")):
        assert source.class_names == ("n01440764", "n02123045")
        found = tool.labels_of(source, range(3), 1000)
        assert sorted(found.accepted.nonzero()[1]) == [0, 281, 281]
        assert found.subset.nonzero()[0].tolist() == [0, 281]
    (tmp_path / "real.json").write_text("[[], [3, 281]]")
    found = tool.labels_of(source, range(3), 1000, real=tmp_path / "real.json")
    assert sorted(found.accepted.sum(1)) == [0, 2, 2] and found.accepted[:, 281].sum() == 2 and found.subset.all()
    (tmp_path / "groups.json").write_text(json.dumps({str(k): int(k < 500) for k in range(1000)}))
    found = tool.labels_of(source, range(3), 1000, groups=tmp_path / "groups.json")
    assert sorted(map(tuple, found.accepted[:, [0, 999]])) == [(0, 1), (1, 0), (1, 0)]
    (tmp_path / "groups.json").write_text('{"0": 1}')
    with pytest.raises(ValueError, match="expected a group for each class 0 to 999, it has 1 keys"):
        tool.labels_of(source, range(3), 1000, groups=tmp_path / "groups.json")


def test_command(network, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "open_network", lambda *args: network)
    out = tmp_path / "r.png"
    args = ["--checkpoint=x", "--data=digits", f"--data-dir={data_dir}", f"--out={out}", "--count=8"]
    assert tool.main([*args, "--batch=8", "--tests=corruptions", "--corruptions=contrast,fog"]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["images"], report["split"], list(report["corruptions"])) == (8, "test", ["contrast", "fog"])
    assert Image.open(out).width == 520
    assert "mean CE" in capsys.readouterr().out
    for wrong, message in (
        ("--tests=x", "'x': expected some of clean"),
        ("--eps=0", "'0': expected numbers above 0"),
        ("--corruptions=frost", "frost: expected pictures larger"),
        ("--data=absent", "absent"),
    ):
        assert tool.main([*args, "--batch=8", "--tests=corruptions", wrong]) == 1
        assert message in capsys.readouterr().err


def test_worst_backgrounds(tmp_path, monkeypatch, capsys):
    random = rng(3)
    shape, threshold = (8, 6), 110.0
    images = {name: random.integers(0, 256, (*shape, 3), np.uint8) for name in "abcd"}
    behind = random.integers(0, 256, (7, *shape, 3), np.uint8)
    behind[2] //= 2
    masks = {
        "a": np.ones(shape),
        "b": random.random(shape) < 0.5,
        "c": np.zeros(shape),
        "d": random.random(shape) < 0.9,
    }
    for number, name in enumerate(images):
        for part in ("fg_mask", "original"):
            (tmp_path / part / "val" / f"0{number % 2}_x").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "fg_mask" / "val" / f"0{number % 2}_x" / f"{name}.npy", masks[name])
        # The published names are .JPEG; the bytes are without loss, for the comparison below.
        Image.fromarray(images[name]).save(tmp_path / "original" / "val" / f"0{number % 2}_x" / f"{name}.JPEG", "png")
    (tmp_path / "only_bg_t" / "val" / "00_x").mkdir(parents=True)
    for number, image in enumerate(behind):
        Image.fromarray(image).save(tmp_path / "only_bg_t" / "val" / "00_x" / f"{number}.png")

    class Bright(nn.Module):  # class 1, of 3, where the mean is above the threshold, else class 0
        num_classes: int = 3
        dtype = jnp.float32

        def __call__(self, x):
            bright = x.mean((1, 2, 3)) > threshold / 255
            return jnp.stack([~bright, bright, jnp.zeros_like(bright)], -1).astype(jnp.float32)

    variant = dataclasses.replace(get_variant("pvt_tiny"), mean=(0.0,) * 3, std=(1.0,) * 3)
    monkeypatch.setattr(backgrounds, "open_network", lambda *args: Network("bright", Bright(), {}, variant, shape))
    (tmp_path / "groups.json").write_text('{"0": 0, "1": 1, "2": -1}')
    out = tmp_path / "found.json"
    command = [str(tmp_path), "--checkpoint=x", f"--groups={tmp_path / 'groups.json'}", "--batch=3", f"--out={out}"]
    assert backgrounds.main(command) == 0
    expected = []
    for number, name in enumerate(images):
        seen = [np.where(masks[name][..., None] != 0, images[name], image).mean() > threshold for image in behind]
        expected.append(set(seen) == {bool(number % 2)})
    assert 0 < sum(expected) < 4
    report = json.loads(out.read_text())
    assert (report["accuracy"], report["foregrounds"], report["backgrounds"]) == (25.0 * sum(expected), 4, 7)
    named = {path[-6] for path in report["deceived"]}
    assert named == {name for name, good in zip(images, expected, strict=True) if not good}
    np.save(tmp_path / "fg_mask" / "val" / "00_x" / "a.npy", np.ones((3, 3)))
    assert backgrounds.main(command) == 1 and "a mask of (3, 3), expected (8, 6)" in capsys.readouterr().err
    (tmp_path / "original" / "val" / "00_x" / "a.JPEG").unlink()
    assert backgrounds.main(command) == 1 and "a.JPEG: not there, of 1 masks" in capsys.readouterr().err
