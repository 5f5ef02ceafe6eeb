"""What every task makes of the same keys: options of a network, numbers of classes, mean and deviation of pixels."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vitpyramid.models.backbone import Variant
from vitpyramid.tasks.task import ConfigError, config_errors


def model_options(config: ConfigDict, fields: Collection[str], **others) -> dict[str, Any]:
    """Arguments of `create_model`; those that only some networks take, `others` too, where they are among `fields`."""
    model = config.model
    some = {"token_drop_rate": model.token_drop_rate, "freeze_statistics": model.freeze_statistics, **others}
    return {
        "num_classes": model.num_classes,
        "image_size": config.data.image_size,
        "drop_rate": model.drop_rate,
        "drop_path_rate": model.drop_path_rate,
        "remat": model.remat,
        "scan": model.scan,
        "dtype": jnp.dtype(model.dtype),
        **{key: value for key, value in some.items() if key in fields},
    }


def with_classes(config: ConfigDict, count: Callable[[], int]) -> ConfigDict:
    """The config with as many classes as the data has, where it says 0; `count` may open the data."""
    if config.model.num_classes:
        return config
    config = config.copy_and_resolve_references()
    with config_errors():
        config.model.num_classes = count()
    return config


def check_classes(config: ConfigDict, count: int) -> None:
    """Raises `ConfigError` where the data has another number of classes than the config."""
    if count != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes = {config.model.num_classes}: expected {count}, as data.name = {config.data.name!r} has"
        )


def channel_statistics(config: ConfigDict, variant: Variant) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels: the config's, or else the network's."""
    return tuple(config.data.mean) or variant.mean, tuple(config.data.std) or variant.std


def skipped(values: Mapping[str, float]) -> list[str]:
    """The number of images that could not be read, in words, if it is not 0."""
    return [f"{values['skipped']:.0f} images skipped"] if values.get("skipped") else []
