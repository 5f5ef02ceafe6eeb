"""The shipped recipes against the published settings, value by value, and timm's learning rate at every epoch."""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from configs import base, pit, t2t_vit
from vitpyramid import list_models
from vitpyramid.heads.registry import DENSE
from vitpyramid.models.registry import get_variant
from vitpyramid.train.config import flatten, validate
from vitpyramid.train.schedule import Horizon, make_schedule, peak_lr

IMAGENET = 1_281_167

# What DeiT's trainer does; the families below differ from it only in what is listed with them.
DEIT = {
    "batch_size": 1024,
    "epochs": 300.0,
    "model.drop_rate": 0.0,
    "model.drop_path_rate": 0.1,
    "model.token_drop_rate": 0.1,
    "model.freeze_statistics": False,
    "data.image_size": 224,
    "data.crop_scale": [0.08, 1.0],
    "data.crop_ratio": [3 / 4, 4 / 3],
    "data.flip": 0.5,
    "data.interpolation": "bicubic",
    "data.auto_augment": "rand-m9-mstd0.5-inc1",
    "data.color_jitter": 0.0,  # 0.4 in the arguments, without effect beside RandAugment
    "data.repeats": 3,
    "data.eval_crop": 0.875,
    "data.eval_interpolation": "bicubic",
    "mix.groups": 8,
    "mix.mixup": 0.8,
    "mix.cutmix": 1.0,
    "mix.prob": 1.0,
    "mix.switch_prob": 0.5,
    "mix.mode": "batch",
    "mix.before_normalise": False,
    "erase.prob": 0.25,
    "erase.mode": "pixel",
    "erase.count": 1,
    "loss.label_smoothing": 0.1,
    "optim.name": "adamw",
    "optim.lr": 5e-4,
    "optim.lr_batch": 512,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.decay_vectors": False,
    "optim.clip_norm": 0.0,
    "optim.lr_rules": [],
    "optim.layer_decay": 1.0,
    "schedule.name": "cosine",
    "schedule.per": "epoch",
    "schedule.lag": 1,
    "schedule.round_up": False,
    "schedule.warmup_epochs": 5.0,
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
    "schedule.cooldown_epochs": 0.0,
    "schedule.scale_ends": False,
    "ema.decay": 0.0,
    "ema.warmup": False,
    "distill.model": "",
}
CLIPPED = {"model.drop_path_rate": 0.3, "optim.clip_norm": 1.0}
PIT = {"optim.name": "adamp", "data.repeats": 1}
REST = {"batch_size": 2048, "optim.clip_norm": 5.0, "schedule.scale_ends": True}
PLAIN = {"data.auto_augment": "", "mix.mixup": 0.0, "mix.cutmix": 0.0, "erase.prob": 0.0, "loss.label_smoothing": 0.0}
T2T = {
    "batch_size": 512,
    "epochs": 310.0,
    "data.repeats": 1,
    "data.interpolation": "random",
    "data.eval_crop": 0.9,
    "mix.before_normalise": True,
    "optim.lr_batch": 0,
    "schedule.lag": 0,
    "schedule.warmup_epochs": 10.0,
    "schedule.cooldown_epochs": 10.0,
    "ema.decay": 0.99996,
}
LITE = {**T2T, "optim.lr": 1e-3, "optim.weight_decay": 0.03}
LARGE = {**T2T, "optim.weight_decay": 0.065}
DISTILLED = {"distill.model": "regnety_160"}
RECIPES = {
    "pvt:tiny": {},
    "pvt:small": {},
    "pvt:medium": CLIPPED,
    "pvt:large": CLIPPED,
    "pit:ti": PIT,
    "pit:xs": PIT,
    "pit:s": PIT,
    "pit:b": {**PIT, "data.repeats": 3, "schedule.warmup_epochs": 10.0},
    "pit:s,setting=vanilla": {**PIT, **PLAIN},
    "pit:ti,setting=cutmix": {**PIT, **PLAIN, "mix.cutmix": 1.0},
    "pit:xs,setting=distill": {**PIT, **DISTILLED},
    "t2t_vit:7": LITE,
    "t2t_vit:10": LITE,
    "t2t_vit:12": LITE,
    "t2t_vit:14": T2T,
    "t2t_vit:t_14": T2T,
    "t2t_vit:19": LARGE,
    "t2t_vit:24": LARGE,
    "t2t_vit:t_19": LARGE,
    "t2t_vit:t_24": LARGE,
    "rest:lite": REST,
    "rest:small": REST,
    "rest:base": {**REST, "model.drop_path_rate": 0.2},
    "rest:large": {**REST, "model.drop_path_rate": 0.3, "batch_size": 1920},
    "deit:tiny": {"ema.decay": 0.99996},
    "deit:base,setting=distill": {"ema.decay": 0.99996, **DISTILLED},
}
# Effective values that follow: peak, steps.
PEAKS = {
    "pvt:small": 1e-3,
    "pit:b": 1e-3,
    "t2t_vit:7": 1e-3,
    "t2t_vit:14": 5e-4,
    "rest:base": 2e-3,
    "rest:large": 1.875e-3,
}
STEPS = {"pvt:tiny": 375_300, "pit:s": 375_300, "t2t_vit:24": 775_620, "rest:lite": 187_500, "deit:tiny": 375_300}


def recipe(text: str):
    file, _, spec = text.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(spec)


@pytest.mark.parametrize("text", RECIPES)
def test_every_value_is_the_published_one(text):
    found = flatten(recipe(text))
    expected = {**DEIT, **RECIPES[text]}
    assert {key: found[key] for key in expected} == expected
    file, _, spec = text.partition(":")
    variant = spec.split(",")[0]
    assert found["model.name"] == f"{file}_{variant}" + "_distilled" * ("distill" in spec)


def test_effective_rates_and_lengths():
    for text, peak in PEAKS.items():
        assert peak_lr(recipe(text)) == pytest.approx(peak, rel=1e-12), text
    for text, steps in STEPS.items():
        assert Horizon.of(recipe(text), IMAGENET).total_steps == steps, text


def timm_rates(text: str) -> list[float]:
    """Learning rate of each epoch, from timm's formula and each trainer's calls of it, in float64."""
    peak, warmup, start, low, lag, length, epochs = {
        "pvt:small": (1e-3, 5, 1e-6, 1e-5, 1, 300, 300),
        "pit:b": (1e-3, 10, 1e-6, 1e-5, 1, 300, 300),
        "t2t_vit:14": (5e-4, 10, 1e-6, 1e-5, 0, 300, 310),
        "rest:lite": (2e-3, 5, 4e-6, 4e-5, 1, 300, 300),
        "rest:large": (1.875e-3, 5, 3.75e-6, 3.75e-5, 1, 300, 300),
    }[text]
    rates = []
    for epoch in range(epochs):
        t = max(epoch - lag, 0)
        if t < warmup:
            rates.append(start + t * (peak - start) / warmup)
        elif t < length:
            rates.append(low + 0.5 * (peak - low) * (1 + math.cos(math.pi * t / length)))
        else:
            rates.append(low)
    return rates


@pytest.mark.parametrize("text", ["pvt:small", "pit:b", "t2t_vit:14", "rest:lite", "rest:large"])
def test_learning_rate_is_timms_in_every_epoch(text):
    config = recipe(text)
    horizon = Horizon.of(config, IMAGENET)
    schedule = make_schedule(config, horizon)
    rates = np.array(timm_rates(text))
    assert horizon.total_steps == len(rates) * horizon.steps_per_epoch
    first = np.arange(len(rates)) * horizon.steps_per_epoch
    for steps in (first, first + horizon.steps_per_epoch - 1):
        np.testing.assert_allclose(schedule(steps), rates, rtol=1e-6)  # float32


def test_finetuning_and_transfer():
    config = recipe("deit:base,finetune=384")
    assert (config.data.image_size, config.epochs, config.optim.weight_decay) == (384, 30.0, 1e-8)
    assert (config.batch_size, config.mix.groups) == (512, 16)
    assert peak_lr(config) == pytest.approx(5e-6)
    schedule = make_schedule(config, Horizon.of(config, IMAGENET))
    assert float(schedule(2502 * 20)) == pytest.approx(5e-6, rel=1e-6)

    config = recipe("rest:base,finetune=384")
    assert (config.batch_size, config.mix.groups) == (1024, 8)
    schedule = make_schedule(config, Horizon.of(config, IMAGENET))
    assert [float(schedule(1251 * epoch)) for epoch in (0, 29)] == pytest.approx([1e-5, 1e-5])

    for text in ("pvt:tiny,finetune=384", "rest:large,finetune=384", "t2t_vit:14,finetune=384", "t2t_vit:7,probe=224"):
        model = recipe(text).model
        rates = model.drop_rate, model.drop_path_rate, model.token_drop_rate
        assert (rates, model.freeze_statistics) == ((0, 0, 0), True), text

    config = recipe("t2t_vit:14,transfer=224,data=cifar10")
    assert (config.model.token_drop_rate, config.model.freeze_statistics) == (0.1, False)
    assert (config.data.name, config.data.crop_padding, config.data.eval_crop) == ("cifar10", 28, 1.0)
    assert config.data.mean == (0.4914, 0.4822, 0.4465)
    assert config.data.interpolation == config.data.eval_interpolation == "bilinear"
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay, config.epochs) == ("sgd", 0.05, 5e-4, 60.0)
    horizon = Horizon.of(config, 50_000)
    assert (horizon.steps_per_epoch, horizon.total_steps) == (782, 60 * 782)  # the last batch of 16 counts
    for factor, ends in ((1.0, (0.05, 2e-4)), (0.01, (5e-4, 2e-4))):  # torch's CosineAnnealingLR, T_max 60
        schedule = make_schedule(config, horizon, factor)
        t = np.arange(60)
        expected = ends[1] + 0.5 * (ends[0] - ends[1]) * (1 + np.cos(np.pi * t / 60))
        np.testing.assert_allclose(schedule(t * horizon.steps_per_epoch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pvt:huge", "'huge' is no variant; expected one of tiny, small, medium, large"),
        (
            "pit:s,setting=best",
            "'setting=best' is no option; expected setting=vanilla|cutmix|deit|distill; finetune=SIZE",
        ),
        ("rest:lite,finetune=12", "'finetune=12' is no option"),
        ("rest:lite,finetune=SIZE", "'finetune=SIZE' is no option"),
    ],
)
def test_unknown_variants_and_options_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(text)


def test_every_published_network_has_a_recipe():
    made = {recipe(text).model.name for text in RECIPES} | {f"t2t_vit_{v}" for v in t2t_vit.STUDIES}
    made |= {recipe(f"pit:{v},setting=distill").model.name for v in pit.VARIANTS}
    made |= {recipe(f"deit:{v}{s}").model.name for v in ("tiny", "small", "base") for s in ("", ",setting=distill")}
    families = ("pvt_", "pit_", "t2t_", "rest_", "deit_")
    assert made == {name for name in list_models() if name.startswith(families) and not name.endswith("_micro")}


def test_results_list_every_published_accuracy():
    """A row for each, with the command that would reproduce it; `ours` stays empty until somebody runs it."""
    rows = [line.split("|") for line in Path(base.__file__).parent.with_name("RESULTS.md").read_text().splitlines()]
    rows = {row[1].strip(): row for row in rows if len(row) == 6 and "`" in row[-2]}
    for text in RECIPES:
        config = recipe(text)
        name = config.model.name
        label = name + (" (vanilla)" if "vanilla" in text else " (cutmix)" if "cutmix" in text else "")
        assert f"--config=configs/{text.replace(':', '.py:')}" in rows[label][-2], label
        if label == name:
            assert float(rows[label][2]) == get_variant(name).top1, label


# What mmdetection's and detectron2's configs of the papers set.
PVT_DETECTION = {
    "task": "detect",
    "batch_size": 16,
    "epochs": 12.0,
    "model.drop_path_rate": 0.1,
    "data.resize": "mmdet",
    "data.interpolation": "opencv",
    "data.short_side": [800],
    "data.short_side_range": False,
    "data.long_side": 1333,
    "data.flip": 0.5,
    "data.channels": "rgb",
    "data.masks": False,
    "data.mean": [],
    "data.std": [],
    "loss.images_per_group": 2,
    "optim.name": "adamw",
    "optim.weight_decay": 1e-4,
    "optim.decay_vectors": True,
    "optim.decay_norms": True,
    "optim.clip_norm": 0.0,
}
MASKS = {"data.masks": True}
MULTI_SCALE = {"epochs": 36.0, "data.short_side": [640, 800], "data.short_side_range": True}
REST_DETECTION = {
    **PVT_DETECTION,
    "epochs": 90_000 / 7330,
    "data.resize": "detectron2",
    "data.interpolation": "bilinear",
    "data.short_side": [640, 672, 704, 736, 768, 800],
    "data.channels": "bgr",
    "data.mean": [103.53 / 255, 116.28 / 255, 123.675 / 255],
    "data.std": [1 / 255] * 3,
    "optim.weight_decay": 0.05,
    "optim.decay_norms": False,
}
DETR = {
    "task": "detect",
    "batch_size": 16,
    "epochs": 50.0,
    "data.masks": False,
    "data.resize": "mmdet",
    "data.interpolation": "opencv",
    "data.short_side": [640, 672, 704, 736, 768, 800],
    "data.short_side_range": False,
    "data.crop_short_side": [],
    "data.long_side": 1333,
    "data.eval_short_side": 800,
    "loss.images_per_group": 0,
    "model.drop_path_rate": 0.1,
    "optim.lr_rules": [["^backbone/", 0.1], [".*", 1.0]],
    "optim.weight_decay": 1e-4,
    "optim.decay_vectors": True,
    "optim.clip_norm": 0.1,
}
DEFORMABLE_DETR = {
    **DETR,
    "data.resize": "detr",
    "data.crop_short_side": [200, 250, 300],
    "data.crop_side": [192, 300],
    "data.interpolation": "bilinear",
    "data.short_side": [240, 256, 272, 288, 304, 320, 336, 352, 368, 384, 400],
    "data.long_side": 666,
    "data.eval_short_side": 400,
    "optim.lr_rules": [["^backbone/", 0.1], ["reference_points|sampling_offsets", 0.1], [".*", 1.0]],
}
SEGMENTATION = {
    "task": "segment",
    "batch_size": 32,
    "model.drop_path_rate": 0.1,
    "data.short_side": [512],
    "data.long_side": 2048,
    "data.scale_range": [0.5, 2.0],
    "data.crop": True,
    "data.canvas": [[512, 512]],
    "data.cat_max_ratio": 0.75,
    "data.photometric": True,
    "data.eval_align": 32,
    "optim.lr": 2e-4,
    "optim.weight_decay": 1e-4,
    "optim.decay_vectors": True,
}
# Besides the values: steps of a run, and the rate at some of them.
DENSE_RECIPES = {
    "detect:retinanet_pvt_small": (
        PVT_DETECTION, 87_960, {0: 1e-7, 250: 5.005e-5, 500: 1e-4, 58_639: 1e-4, 58_640: 1e-5, 80_630: 1e-6}
    ),
    "detect:retinanet_pvt_large": ({**PVT_DETECTION, "model.drop_path_rate": 0.0}, 87_960, {600: 1e-4}),
    "detect:retinanet_pvt_tiny,schedule=3x": (
        {**PVT_DETECTION, **MULTI_SCALE}, 263_880, {197_909: 1e-4, 197_910: 1e-5}
    ),
    "detect:mask_rcnn_pvt_small": ({**PVT_DETECTION, **MASKS}, 87_960, {600: 2e-4}),
    "detect:mask_rcnn_pvt_large": (
        {**PVT_DETECTION, **MASKS, "model.drop_path_rate": 0.0, "batch_size": 8, "loss.images_per_group": 1},
        175_908,
        {1100: 2e-4 / 1.4},
    ),
    "detect:retinanet_rest_base": (
        {**REST_DETECTION, "model.drop_path_rate": 0.2}, 90_000, {0: 1e-7, 1000: 1e-4, 60_000: 1e-5, 80_000: 1e-6}
    ),
    "detect:mask_rcnn_rest_small": ({**REST_DETECTION, **MASKS}, 90_000, {59_999: 1e-4}),
    "detr:detr_pvt_small": (DETR, 366_500, {0: 1e-4, 241_889: 1e-4, 241_890: 1e-5}),
    "detr:deformable_detr_two_stage_pit_s": (DEFORMABLE_DETR, 366_500, {0: 2e-4, 293_199: 2e-4, 293_200: 2e-5}),
    "segment:semantic_fpn_pvt_small": (SEGMENTATION, 40_000, {0: 2e-4, 20_000: 2e-4 * 0.5**0.9, 39_999: 1.442e-8}),
}  # fmt: skip


@pytest.mark.parametrize("text", DENSE_RECIPES)
def test_dense_prediction_is_as_published(text):
    config = recipe(text)
    expected, steps, rates = DENSE_RECIPES[text]
    found = flatten(config)
    assert {key: found[key] for key in expected} == expected
    assert found["model.name"] == text.split(":")[1].split(",")[0]
    assert found["model.drop_path_rate"] == DENSE[found["model.name"]].options["drop_path_rate"]
    horizon = Horizon.of(config, 20_210 if config.task == "segment" else 117_266)
    assert horizon.total_steps == steps
    schedule = make_schedule(config, horizon)
    assert {step: float(schedule(step)) for step in rates} == pytest.approx(rates, rel=1e-3)
    validate(config, base.get_config(), 8)
