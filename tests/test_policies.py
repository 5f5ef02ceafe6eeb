"""vitpyramid.data.policies: timm's strings, tables and random draws."""

import collections
import itertools
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from golden import FOLDER
from vitpyramid.data import policies

DRAWS = 20_000
GREY = Image.new("RGB", (8, 8), (90, 90, 90))
GOLDENS = np.load(FOLDER / "augment.npz")
FIFTEEN = [
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
]


def bicubic():
    return Image.Resampling.BICUBIC


def applied(monkeypatch, text, draws=DRAWS):
    """What `draws` images get: a list for each of [(operation, level), ...]."""
    images = []
    monkeypatch.setattr(policies, "apply_step", lambda name, level, *rest: images[-1].append((name, level)))
    policy, rng = policies.parse(text), np.random.default_rng(0)
    for _ in range(draws):
        images.append([])
        policies.apply(policy, GREY, bicubic, rng)
    return images


def assert_share(count, total, expected):
    """Within four standard deviations of a binomial's mean."""
    assert abs(count - total * expected) <= 4 * math.sqrt(total * expected * (1 - expected)) + 1e-9, (count, total)


def test_the_recipes_string(monkeypatch):
    images = applied(monkeypatch, "rand-m9-mstd0.5-inc1")
    sizes = collections.Counter(map(len, images))
    for size, share in enumerate((0.25, 0.5, 0.25)):  # two draws, each applied with probability 1/2
        assert_share(sizes[size], DRAWS, share)
    both = [image for image in images if len(image) == 2]
    assert_share(sum(a[0] == b[0] for a, b in both), len(both), 1 / 15)  # with replacement
    steps = list(itertools.chain(*images))
    names = collections.Counter(name for name, _ in steps)
    assert set(names) == set(FIFTEEN)
    for name in FIFTEEN:
        assert_share(names[name], len(steps), 1 / 15)
    levels = np.array([level for _, level in steps])
    assert levels.max() == 10
    assert_share((levels == 10).sum(), len(levels), 0.02275)  # two standard deviations above 9
    for place, share in ((8.5, 0.1587), (9, 0.5), (9.5, 0.8413)):
        assert_share((levels < place).sum(), len(levels), share)


def test_other_strings(monkeypatch):
    plain = list(itertools.chain(*applied(monkeypatch, "rand-m7-n3-p1")))
    assert len(plain) == 3 * DRAWS and {level for _, level in plain} == {7}
    assert {name for name, _ in plain} == {name.removesuffix("Increasing") for name in FIFTEEN}
    assert {level for _, level in itertools.chain(*applied(monkeypatch, "rand-m15-p1", 10))} == {10}
    assert {level for _, level in itertools.chain(*applied(monkeypatch, "rand-m15-mmax12-p1", 10))} == {12}
    assert {level for _, level in itertools.chain(*applied(monkeypatch, "rand-p1", 10))} == {10}
    assert applied(monkeypatch, "rand-p0", 10) == [[]] * 10
    uniform = np.array([level for image in applied(monkeypatch, "rand-m8-mstd101-p1") for _, level in image])
    for place in (1, 4, 7):
        assert_share((uniform < place).sum(), len(uniform), place / 8)
    noisy = [level for image in applied(monkeypatch, "rand-m0-mstd2-p1", 100) for _, level in image]
    assert min(noisy) == 0 and max(noisy) > 2


def test_weights(monkeypatch):
    images = applied(monkeypatch, "rand-n1-p1-w0")
    names = collections.Counter(name for [(name, _)] in images)
    expected = {"Rotate": 0.3, "ShearX": 0.2, "TranslateYRel": 0.1, "Color": 0.025, "Equalize": 0.005, "Invert": 0}
    for name, share in expected.items():
        assert_share(names[name], DRAWS, share)
    for image in applied(monkeypatch, "rand-n13-p1-w0", 50):  # without replacement: the thirteen that weigh something
        assert len({name for name, _ in image}) == 13


@pytest.mark.parametrize("name", ["v0", "v0r", "original", "originalr"])
def test_auto_augment_tables_are_timms(name):
    found = [
        ", ".join(f"{step.name} {step.probability:g} {step.magnitude:g}" for step in pair)
        for pair in policies.parse(name).choices
    ]
    assert found == list(GOLDENS[f"policy {name}"])


def test_auto_augment_draws(monkeypatch):
    images = applied(monkeypatch, "original-mstd0.5")
    # pairs are drawn alike: Sharpness stands in one of 25, with probability 0.4
    assert_share(sum("Sharpness" in dict(image) for image in images), DRAWS, 0.4 / 25)
    turns = np.array([level for image in images for name, level in image[:1] if name == "Sharpness"])
    assert abs(turns.mean() - 7) < 4 * 0.5 / math.sqrt(len(turns)) and 0.4 < turns.std() < 0.6
    order = [tuple(name for name, _ in image) for image in images]
    assert ("ShearX", "Equalize") in order and ("Equalize", "ShearX") not in order


def test_signs_and_arguments(monkeypatch):
    rng, seen = np.random.default_rng(0), []
    record = lambda image, argument, *resample: seen.append(argument)  # noqa: E731
    for table in (policies._GEOMETRIC, policies._GRADED):
        for name, (_, argument) in table.items():
            monkeypatch.setitem(table, name, (record, argument))

    def arguments(name, level, draws=2000):
        seen.clear()
        for _ in range(draws):
            policies.apply_step(name, level, GREY, bicubic, rng)
        return np.array(seen)

    expected = {"Rotate": 27, "ShearX": 0.27, "ShearY": 0.27, "TranslateXRel": 0.405, "TranslateYRel": 0.405}
    for name, size in expected.items():
        values = arguments(name, 9)
        np.testing.assert_allclose(np.abs(values), size)
        assert_share((values > 0).sum(), 2000, 0.5)
    for name in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"):
        values = arguments(name, 9)
        np.testing.assert_allclose(np.abs(values - 1), 0.81)
        assert_share((values > 1).sum(), 2000, 0.5)
        assert arguments(name, 12).min() == 0.1  # only mmax comes here
    whole = {
        ("PosterizeIncreasing", 7.4): 2,
        ("PosterizeIncreasing", 7.5): 1,
        ("PosterizeIncreasing", 9.9): 1,
        ("PosterizeIncreasing", 10): 0,
        ("PosterizeIncreasing", 30): 0,
        ("Posterize", 9): 3,
        ("Posterize", 30): 8,
        ("PosterizeOriginal", 9): 7,
        ("SolarizeIncreasing", 9): 26,
        ("SolarizeIncreasing", 11): 0,
        ("Solarize", 9): 230,
        ("Solarize", 11): 256,
        ("SolarizeAdd", 9): 99,
        ("SolarizeAdd", 12): 128,
    }
    for (name, level), value in whole.items():
        assert set(arguments(name, level, 3)) == {value}, (name, level)
    np.testing.assert_allclose(arguments("Color", 9, 3), 1.72)


def test_three_augment(monkeypatch):
    rng, seen = np.random.default_rng(0), []
    monkeypatch.setitem(policies._PLAIN, "Grey", lambda image: seen.append(("grey", 0)))
    for name in ("Solarize", "GaussianBlur"):
        argument = policies._GRADED[name][1]
        monkeypatch.setitem(
            policies._GRADED, name, (lambda image, value, name=name: seen.append((name, value)), argument)
        )
    for _ in range(3000):
        policies.apply(policies.parse("3a"), GREY, bicubic, rng)
    assert len(seen) == 3000  # one of the three, always
    for count in collections.Counter(name for name, _ in seen).values():
        assert_share(count, 3000, 1 / 3)
    assert {value for name, value in seen if name == "Solarize"} == {128}
    radii = np.array([value for name, value in seen if name == "GaussianBlur"])
    assert 0.1 <= radii.min() < 0.15 and 1.95 < radii.max() <= 2 and abs(radii.mean() - 1.05) < 0.08


def test_color_jitter(monkeypatch):
    orders, factors = collections.Counter(), []
    seen = []
    for name in ("brightness", "contrast", "color"):
        monkeypatch.setattr(policies.ops, name, lambda image, factor, name=name: seen.append((name, factor)))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        seen.clear()
        policies.color_jitter(GREY, 0.3, rng)
        orders[tuple(name for name, _ in seen)] += 1
        factors += [factor for _, factor in seen]
    assert len(orders) == 6
    for count in orders.values():
        assert_share(count, 3000, 1 / 6)
    factors = np.sort(factors)
    assert np.abs((factors - 0.7) / 0.6 - np.linspace(0, 1, len(factors))).max() < 0.02  # uniform
    seen.clear()
    for _ in range(300):
        policies.color_jitter(GREY, 1.5, rng)
    assert 0 <= min(factor for _, factor in seen) < 0.05  # not below 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("randaugment", "no policy 'randaugment'"),
        ("rand-m9-q3", "'q3' does not belong there"),
        ("rand-m9-m5", "'m5'"),
        ("rand-inc", "'inc'"),
        ("rand-m9.5", "9.5"),
        ("rand-p1.5", "p1.5 is no probability"),
        ("rand-n0", "n0"),
        ("rand-w1", "only -w0"),
        ("rand-w0-inc1", "without -inc1"),
        ("rand-w0-n14", "at most 13"),
        ("v0-m9", "'m9'"),
        ("3a-mstd0.5", "no policy '3a'"),
        ("rand m9", "no policy"),
    ],
)
def test_refuses_what_it_does_not_know(text, problem):
    with pytest.raises(ValueError) as caught:
        policies.parse(text)
    message = str(caught.value)
    assert message.startswith(f"data.auto_augment = {text!r}: ") and problem in message and "expected" in message


def test_inc0_and_nothing():
    assert policies.parse("") is None
    assert policies.parse("rand-inc0") == policies.parse("rand")
    assert pickle.loads(pickle.dumps(policies.parse("rand-m9-mstd0.5-inc1"))) == policies.parse("rand-m9-mstd0.5-inc1")
