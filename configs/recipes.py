"""Recipes that families share: functions that change a config, and the part of `--config=FILE:...` after the colon."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from vitpyramid.models.registry import get_variant


def parse(text: str, file: str, variants: Sequence[str], options: Mapping[str, Sequence[str]]) -> tuple[str, dict]:
    """Splits `VARIANT,option=value,...`.

    Args:
      options: by name, the values that each may have; "SIZE" stands for a number of pixels of at least 32.

    Raises:
      ValueError: another variant, option or value than these; the message lists them.
    """
    variant, *rest = text.split(",")
    if variant not in variants:
        raise ValueError(f"{file}:{text}: {variant!r} is no variant; expected one of {', '.join(variants)}")
    chosen = {}
    for item in rest:
        key, _, value = item.partition("=")
        allowed = options.get(key, ())
        size = "SIZE" in allowed and value.isdecimal() and int(value) >= 32
        if not size and value not in set(allowed) - {"SIZE"}:
            choices = "; ".join(f"{name}={'|'.join(values)}" for name, values in options.items())
            raise ValueError(f"{file}:{text}: {item!r} is no option; expected {choices}")
        chosen[key] = int(value) if size else value
    return variant, chosen


# Options that every family has; `adapt` carries them out.
ADAPTATIONS = {"finetune": ("SIZE",), "transfer": ("SIZE",), "probe": ("SIZE",)}


def network(config: ConfigDict, name: str) -> None:
    """The network, and how its authors crop images to evaluate it."""
    config.model.name = name
    config.data.eval_crop = get_variant(name).crop


def deit(config: ConfigDict) -> None:
    """DeiT's recipe (arXiv 2012.12877, its `main.py`), on which PVT, PiT and ResT were trained: 300 epochs."""
    config.batch_size = 1024
    config.mix.groups = 8  # the authors' GPUs
    config.epochs = 300.0
    config.model.drop_path_rate = 0.1
    config.optim.lr, config.optim.lr_batch, config.optim.weight_decay = 5e-4, 512, 0.05
    schedule = config.schedule
    schedule.per, schedule.lag = "epoch", 1
    schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr = 5.0, 1e-6, 1e-5
    config.data.repeats = 3
    augmentation(config)


def augmentation(config: ConfigDict) -> None:
    """RandAugment, mixup, CutMix, random erasing and label smoothing, as in all four papers."""
    config.data.auto_augment = "rand-m9-mstd0.5-inc1"
    config.mix.mixup, config.mix.cutmix = 0.8, 1.0
    config.erase.prob = 0.25
    config.loss.label_smoothing = 0.1


def no_augmentation(config: ConfigDict) -> None:
    """Crops and flips only."""
    config.data.auto_augment = ""
    config.data.repeats = 1
    config.mix.mixup = config.mix.cutmix = config.erase.prob = config.loss.label_smoothing = 0.0


def distill(config: ConfigDict) -> None:
    """DeiT's hard distillation into the network's second head; `--config.distill.teacher` says where the teacher is.

    The published teacher is `regnety_160` (regnety_160-a5fe301d.pth).
    """
    config.model.name += "_distilled"
    config.distill.model = "regnety_160"
    config.distill.kind, config.distill.alpha, config.distill.tau = "hard", 0.5, 1.0


def adapt(config: ConfigDict, chosen: dict) -> ConfigDict:
    """Carries the options of `ADAPTATIONS` out; all start from `--config.init`."""
    for key, change in (("finetune", finetune), ("transfer", transfer), ("probe", probe)):
        if key in chosen:
            config.data.image_size = chosen[key]
            change(config)
    return config


def finetune(config: ConfigDict) -> None:
    """The same data at another size: DeiT's 384 recipe (its `README_deit.md`), 30 epochs at a constant 5e-6."""
    config.batch_size = 512
    config.mix.groups = 16
    config.epochs = 30.0
    evaluation_mode(config)
    config.optim.lr, config.optim.lr_batch, config.optim.weight_decay = 5e-6, 512, 1e-8
    config.schedule.min_lr = 5e-6
    config.schedule.cooldown_epochs = 0.0


def evaluation_mode(config: ConfigDict) -> None:
    """The network is trained in evaluation mode, where the official code leaves it: nothing drops, statistics stay."""
    config.model.drop_rate = config.model.drop_path_rate = config.model.token_drop_rate = 0.0
    config.model.freeze_statistics = True


def transfer(config: ConfigDict) -> None:
    """Other data: SGD, a new head at 0.05, everything else at a hundredth of it, as T2T-ViT's CIFAR runs; 60 epochs."""
    no_augmentation(config)
    config.batch_size = 64
    config.epochs = 60.0
    config.model.num_classes = 0
    config.model.drop_path_rate = 0.1
    optim, schedule = config.optim, config.schedule
    optim.name, optim.momentum, optim.weight_decay, optim.decay_vectors = "sgd", 0.9, 5e-4, True
    optim.lr, optim.lr_batch, optim.clip_norm = 0.05, 0, 0.0
    optim.lr_rules = (("^head", 1.0), (".*", 0.01))
    schedule.per, schedule.lag = "epoch", 0
    schedule.warmup_epochs, schedule.cooldown_epochs, schedule.min_lr = 0.0, 0.0, 2e-4
    config.ema.decay = 0.0
    config.eval.batch_size = 64


def probe(config: ConfigDict) -> None:
    """Other data, a linear probe: only the head is trained, with SGD without decay; 100 epochs."""
    transfer(config)
    config.epochs = 100.0
    evaluation_mode(config)
    config.optim.lr, config.optim.weight_decay = 0.1, 0.0
    config.optim.lr_rules = (("^head", 1.0), (".*", 0.0))
    config.schedule.min_lr = 0.0
