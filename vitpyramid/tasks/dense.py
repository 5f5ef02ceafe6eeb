"""What the tasks of dense prediction share: networks with heads, canvases of images, weights to start from."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from ml_collections import ConfigDict

from vitpyramid.data import dense_pipeline
from vitpyramid.data import dense_transforms as transforms
from vitpyramid.data.annotated import Annotated, open_annotated
from vitpyramid.heads import registry
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.models.registry import get_variant
from vitpyramid.models.registry import list_models as list_backbones
from vitpyramid.models.stack import stack_blocks
from vitpyramid.tasks import options
from vitpyramid.tasks import prepare as on_device
from vitpyramid.tasks.metrics import Metrics, Sum
from vitpyramid.tasks.rules import SHARE, Rule, between, interval, one_of
from vitpyramid.tasks.task import Batch, Task, config_errors
from vitpyramid.weights import load_pretrained
from vitpyramid.weights.dense_start import from_classifier

log = logging.getLogger(__name__)

SIDE = between(1, 2**14)
CANVASES = Rule(
    lambda v: all(len(size) == 2 and all(map(between(32, 2**14).holds, size)) for size in v),
    "(height, width) pairs, each side at least 32 and at most 16,384",
)
RULES = {
    "model.backbone": Rule(lambda v: v in ("", *list_backbones()), "the name of a backbone, or ''"),
    "data.channels": one_of("rgb", "bgr"),
    "data.interpolation": one_of(*transforms.INTERPOLATIONS),
    "data.resize": one_of(*transforms.RULES),
    "data.short_side": Rule(lambda v: len(v) and all(map(SIDE.holds, v)), f"numbers, each {SIDE.expected}"),
    "data.long_side": SIDE,
    "data.scale_range": interval(0.01, 100),
    "data.crop_short_side": Rule(lambda v: all(map(SIDE.holds, v)), f"numbers, each {SIDE.expected}"),
    "data.crop_side": interval(1, 2**14),
    "data.canvas": CANVASES,
    "data.max_boxes": between(1, 10_000),
    "data.cat_max_ratio": SHARE,
    "data.eval_short_side": SIDE,
    "data.eval_align": between(1, 1024),
    "data.eval_canvas": CANVASES,
    "loss.images_per_group": between(0, 2**20),
}


@flax.struct.dataclass
class View:
    """What a network of dense prediction is given.

    Attributes:
      images: `[B, H, W, 3]`, normalised, zeros on the right and below of the images.
      sizes: int32 `[B, 2]`, their heights and widths.
      targets: what is learned, in training.
    """

    images: jax.Array
    sizes: jax.Array
    targets: Any = None


def networks(*classes: type[DenseNetwork]) -> Rule:
    """Names of networks of these classes."""
    names = [name for name, variant in registry.DENSE.items() if issubclass(variant.network, classes)]
    return Rule(lambda v: v in names, f"one of {', '.join(names)}")


def check(config: ConfigDict) -> list[str]:
    """What keys contradict each other, a line each."""
    group, rows = config.loss.images_per_group, config.batch_size // config.optim.accumulate
    if group and not hasattr(registry.DENSE[config.model.name].network, "images_per_group"):
        return [f"loss.images_per_group = {group}: expected 0 with {config.model.name}, whose divisors are the batch's"]
    if group and rows % group:
        return [f"loss.images_per_group = {group}: expected a divisor of the {rows} images that a step takes at a time"]
    return []


def make_model(config: ConfigDict) -> DenseNetwork:
    """The network of a config."""
    variant = registry.DENSE[config.model.name]
    fields = {field.name for field in dataclasses.fields(variant.network)}
    fields |= {field.name for field in dataclasses.fields(get_variant(backbone_name(config)).model)}
    made = options.model_options(config, fields, images_per_group=config.loss.images_per_group or None)
    return registry.create_model(config.model.name, config.model.backbone or None, **made)


def backbone_name(config: ConfigDict) -> str:
    """The config's, or that of its network."""
    return config.model.backbone or registry.DENSE[config.model.name].backbone


def network(config: ConfigDict) -> dict[str, Any]:
    """What makes the network again, by config key."""
    keys = ("model.name", "model.backbone", "model.num_classes", "data.image_size", "model.scan")
    return {key: config[key.split(".")[0]][key.split(".")[1]] for key in keys}


def open_split(config: ConfigDict, training: bool) -> Annotated:
    """The source of training or evaluation. Raises `ConfigError` if it cannot be had, or is of other classes."""
    split = config.data.train_split if training else config.data.eval_split
    with config_errors():
        source = open_annotated(config.data, split, config.task, training)
    options.check_classes(config, len(source.categories))
    return source


def batch(
    config: ConfigDict, open_source: Callable[[bool], Annotated], evaluation: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch as `dense_pipeline` makes it, on the largest canvas."""
    settings, rows = config.data, config.eval.batch_size if evaluation else config.batch_size
    sizes = settings.eval_canvas if evaluation else settings.canvas
    if not sizes:
        resize = (dense_pipeline.eval_resize if evaluation else dense_pipeline.train_resize)(settings)
        with config_errors():
            sizes = dense_pipeline.canvases(open_source(not evaluation), (), resize).sizes
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    shapes = {"image": ((height, width, 3), jnp.uint8), "size": ((2,), jnp.int32)}
    if evaluation:
        shapes |= {"original_size": ((2,), jnp.int32), "scale": ((2,), jnp.float32)}
        shapes |= {"index": ((), jnp.int32), "mask": ((), jnp.bool_)}
    elif config.task == "segment":
        shapes["label"] = (height, width), jnp.uint8
    else:
        slots = settings.max_boxes
        shapes |= {"boxes": ((slots, 4), jnp.float32), "labels": ((slots,), jnp.int32), "valid": ((slots,), jnp.bool_)}
        shapes["dropped"] = (), jnp.int32
        if settings.masks:
            shapes["masks"] = (slots, height, -(-width // 8)), jnp.uint8
    if settings.on_corrupt == "skip":
        shapes["skipped"] = (), jnp.bool_
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def make_task(
    make: Callable[[ConfigDict, DenseNetwork, Callable[[bool], Annotated]], dict], config: ConfigDict
) -> Task:
    """The task of a config that `train.config.validate` has accepted.

    Args:
      make: what is a task's own, by field of `Task`, and `targets`, `batch -> ` what is learned; from the config, the
        network, and `training -> ` the source of that split.

    Raises:
      ConfigError: `model.num_classes` is 0 and the data cannot be opened. The task's functions that open files raise it
        where the config does not fit them.
    """
    split = config.data.eval_split
    config = options.with_classes(config, lambda: len(open_annotated(config.data, split, config.task).categories))
    model = make_model(config)
    open_source = functools.cache(functools.partial(open_split, config))
    hosts = (jax.process_index(), jax.process_count())
    own = make(config, model, open_source)
    targets = own.pop("targets")

    def train_batches(step: int):
        with config_errors():
            return dense_pipeline.make_train(config, open_source(True), step, *hosts)

    def eval_batches():
        with config_errors():
            return dense_pipeline.make_eval(config, open_source(False), *hosts)

    def prepare(key: jax.Array, batch: Batch, constants: dict) -> tuple[View, Batch]:
        del key, constants
        return prepare_eval(batch).replace(targets=targets(batch)), counted(batch)

    def prepare_eval(batch: Batch) -> View:
        return View(canvas(batch, config, model.dtype), batch["size"])

    return Task(
        config=config,
        title=f"{config.model.name} on {config.data.name}",
        unit="images",
        model=model,
        network=network(config),
        num_examples=lambda: len(open_source(True)),
        batch=functools.partial(batch, config, open_source),
        train_batches=train_batches,
        eval_batches=eval_batches,
        prepare=prepare,
        prepare_eval=prepare_eval,
        loss=loss,
        initial=lambda: load_initial(config, model),
        **own,
    )


def loss(losses: Mapping[str, jax.Array], counted: Batch) -> tuple[jax.Array, Metrics]:
    """The sum of a network's losses, each of them, and what is `counted`."""
    totals = {name: value.sum() for name, value in losses.items()}
    metrics = {name: clu_metrics.Average.from_model_output(value) for name, value in totals.items()}
    return sum(totals.values()), metrics | sums(counted)


def counted(batch: Batch) -> Batch:
    """Of the rows of a batch what is counted in words: whether another image stands for one that cannot be read, and
    objects for which there is no slot."""
    return {name: rows for name, rows in batch.items() if name in ("skipped", "dropped")}


def sums(counted: Batch) -> Metrics:
    """Of all rows."""
    return {name: Sum.from_model_output(rows) for name, rows in counted.items()}


def canvas(batch: Batch, config: ConfigDict, dtype) -> jax.Array:
    """Images of a batch as the network takes them: normalised, then zeros beyond their sizes."""
    mean, std = options.channel_statistics(config, get_variant(backbone_name(config)))
    pixels = batch["image"] if config.data.channels == "rgb" else batch["image"][..., ::-1]
    height, width = pixels.shape[1:3]
    rows, columns = (side[:, None] for side in jnp.split(batch["size"], 2, axis=1))
    inside = (jnp.arange(height)[:, None] < rows) & (jnp.arange(width) < columns)
    return jnp.where(inside[..., None], on_device.normalise(pixels, mean, std, dtype), 0)


def load_initial(config: ConfigDict, model: DenseNetwork) -> dict | None:
    """Variables of the network that begin with those of `config.init`: a classifier's, or of the whole network.

    Of a whole one what has another number of classes begins anew. Of a classifier, what neither the weights nor the
    network have of the other is logged by name. None without `config.init`.
    """
    if not config.init:
        return None
    log.info("reading init: %s", config.init)
    name, backbone = config.model.name, backbone_name(config)
    wanted = {"num_classes": config.model.num_classes, "image_size": config.data.image_size, "seed": config.seed}
    with config_errors(f"init = {config.init!r}: "):
        try:
            _, variables = load_pretrained(config.init, name, backbone=backbone, **wanted)
        except ValueError as no_network:
            try:
                weights = _classifier(config, backbone)
            except ValueError as no_backbone:
                raise ValueError(f"neither weights of {name}: {no_network}\nnor of {backbone}: {no_backbone}") from None
        else:
            if config.model.scan:
                variables = {**variables, "params": stack_blocks(variables["params"], model.stages)}
            return variables
        variables, unused, initialised = from_classifier(model, weights, config.seed)
    for what, paths in (("has no place for", unused), ("begins anew with", initialised)):
        if named := [path.split("/", 1)[1] for path in paths]:
            log.info("init: %s %s %s", name, what, ", ".join(_folded(named, model.after)))
    return variables


def _classifier(config: ConfigDict, name: str) -> dict:
    """Variables of a backbone, with its last norm and head where the file has them."""
    wanted = {"image_size": config.data.image_size, "seed": config.seed}
    try:
        _, weights = load_pretrained(config.init, name, **wanted)
    except ValueError:
        _, weights = load_pretrained(config.init, name, features_only=True, **wanted)
    if config.model.scan:
        weights = {**weights, "params": stack_blocks(weights["params"], get_variant(name).model.stages)}
    return weights


def _folded(paths: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Paths, those of one of the modules as that module's name."""
    return list(dict.fromkeys(next((m for m in modules if path.startswith(f"{m}/")), path) for path in paths))
