"""Image classification: crops and their labels in, mixed labels and a teacher to learn from, top-1 and top-5 out."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from ml_collections import ConfigDict

from vitpyramid import data
from vitpyramid.data import policies
from vitpyramid.models.registry import create_model, get_variant, list_models
from vitpyramid.models.stack import stack_blocks
from vitpyramid.tasks import options
from vitpyramid.tasks import prepare as on_device
from vitpyramid.tasks.metrics import Metrics, Sum
from vitpyramid.tasks.rules import BATCH, FRACTION, PROBABILITY, Rule, between, channels, interval, one_of
from vitpyramid.tasks.task import Batch, ConfigError, Task, config_errors
from vitpyramid.weights import load_pretrained

log = logging.getLogger(__name__)

BEST = "top1"  # of an evaluation

# Every numeric key has a rule (a test checks it).
RULES = {
    "model.name": Rule(lambda v: v in list_models(), "one of vitpyramid.list_models()"),
    "model.num_classes": between(0, 10**6),
    "model.drop_rate": FRACTION,
    "model.drop_path_rate": FRACTION,
    "model.token_drop_rate": FRACTION,
    "model.dtype": one_of("bfloat16", "float32"),
    "data.image_size": between(32, 4096),
    "data.crop_scale": interval(1e-4, 1),
    "data.crop_ratio": interval(0.01, 100),
    "data.crop_padding": between(0, 4096),
    "data.flip": PROBABILITY,
    "data.interpolation": one_of("bicubic", "bilinear", "random"),
    "data.auto_augment": Rule(lambda v: policies.parse(v) or not v, policies.EXPECTED),
    "data.color_jitter": between(0, 10),
    "data.repeats": between(1, 1000),
    "data.eval_crop": between(0.1, 1),
    "data.eval_interpolation": one_of("bicubic", "bilinear"),
    "data.on_corrupt": one_of("error", "skip"),
    "data.mean": channels(between(0, 1)),
    "data.std": channels(between(0, 10, above=True)),
    "data.threads": between(1, 1024),
    "data.workers": between(0, 1024),
    "mix.groups": BATCH,
    "mix.mixup": between(0, 1000),
    "mix.cutmix": between(0, 1000),
    "mix.prob": PROBABILITY,
    "mix.switch_prob": PROBABILITY,
    "mix.mode": one_of("batch", "pair", "elem"),
    "erase.prob": PROBABILITY,
    "erase.mode": one_of("pixel", "rand", "const"),
    "erase.count": between(1, 100),
    "loss.label_smoothing": FRACTION,
    "distill.model": Rule(lambda v: v in ("", *list_models()), "one of vitpyramid.list_models(), or ''"),
    "distill.kind": one_of("hard", "soft"),
    "distill.alpha": PROBABILITY,
    "distill.tau": between(0, 1000, above=True),
}


def check(config: ConfigDict, evaluation: bool) -> list[str]:
    """What keys contradict each other, a line each; `evaluation`: nothing will be trained."""
    problems = []
    if config.model.name.endswith("_distilled") and not config.distill.teacher and not evaluation:
        problems.append("distill.teacher = '': expected a teacher's weights, as the network has a head for it")
    groups, rows = config.mix.groups, config.batch_size
    if groups > 1 and rows % (2 * groups):
        problems.append(f"mix.groups = {groups}: expected batch_size = {rows} to be a multiple of twice as many")
    return problems


def make_task(config: ConfigDict, teacher: Callable[[], tuple[nn.Module | None, dict]] | None = None) -> Task:
    """The task of a config that `train.config.validate` has accepted.

    Args:
      teacher: gives the network to learn from and its variables; None: the config says which.

    Raises:
      ConfigError: `model.num_classes` is 0 and the data cannot be opened. The task's functions that open files raise it
        where the config does not fit them.
    """
    config = options.with_classes(config, lambda: data.open_source(config.data, config.data.eval_split).num_classes)
    model = _model(config)
    open_split = functools.cache(functools.partial(_open_split, config))
    teacher = teacher or functools.cache(functools.partial(_load_teacher, config))
    mean, std = options.channel_statistics(config, get_variant(config.model.name))
    hosts = (jax.process_index(), jax.process_count())

    def train_batches(step: int) -> data.BatchIterator:
        with config_errors():
            return data.make_train(config, open_split(config.data.train_split), step, *hosts)

    def eval_batches() -> data.EvalBatches:
        with config_errors():
            return data.make_eval(config, open_split(config.data.eval_split), *hosts)

    def prepare(key: jax.Array, batch: Batch, constants: dict) -> tuple[jax.Array, Batch]:
        targets = smooth_one_hot(batch["label"], config.model.num_classes, config.loss.label_smoothing)
        images, mixed = on_device.prepare(key, batch["image"], targets, config, mean, std, model.dtype)
        targets = {name: rows for name, rows in batch.items() if name != "image"} | {"mixed": mixed}
        if constants:
            targets["teacher"] = teacher()[0].apply(constants, images)
        return images, targets

    def measure(logits: jax.Array, batch: Batch) -> Metrics:
        losses = cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
        return _measured(logits, batch, batch["mask"], loss=losses)

    return Task(
        config=config,
        title=f"{config.model.name} on {config.data.name}",
        unit="images",
        model=model,
        network={
            "model.name": config.model.name,
            "model.num_classes": config.model.num_classes,
            "data.image_size": config.data.image_size,
            "model.scan": config.model.scan,
        },
        num_examples=lambda: len(open_split(config.data.train_split)),
        batch=functools.partial(_batch, config),
        train_batches=train_batches,
        eval_batches=eval_batches,
        prepare=prepare,
        prepare_eval=lambda batch: on_device.normalise(batch["image"], mean, std, model.dtype),
        loss=functools.partial(loss, config.distill),
        measure=measure,
        words=words,
        best=BEST,
        constants=lambda: teacher()[1],
        about=lambda: {"classes": list(open_split(config.data.train_split).class_names)},
        initial=lambda: _load_initial(config, model),
        without_weights=functools.partial(_without_weights, config),
    )


def _batch(config: ConfigDict, evaluation: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch as `data.make_train` and `data.make_eval` make it."""
    size, rows = config.data.image_size, config.eval.batch_size if evaluation else config.batch_size
    shapes = {"image": ((rows, size, size, 3), jnp.uint8), "label": ((rows,), jnp.int32)}
    flags = ("mask",) * evaluation + ("skipped",) * (config.data.on_corrupt == "skip")
    shapes |= dict.fromkeys(flags, ((rows,), jnp.bool_))
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def loss(distill: ConfigDict, logits, targets: Batch) -> tuple[jax.Array, Metrics]:
    """Mean loss of rows `{mixed [B, K], label [B], ...}`; with `teacher` [B, K], its logits, as DeiT is distilled.

    `logits` are `[B, K]`, or a pair of such from a network with two heads, of which the second learns from the teacher.
    """
    logits, student = logits if isinstance(logits, tuple) else (logits, logits)
    losses = cross_entropy(logits, targets["mixed"])
    if "teacher" in targets:
        taught = distillation(student, targets["teacher"], distill.kind, distill.tau)
        losses = (1 - distill.alpha) * losses + distill.alpha * taught
    return losses.mean(), _measured(logits, targets)


def smooth_one_hot(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels `[B]` as distributions `[B, K]`: `1 - s + s / K` at the label, `s / K` elsewhere."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-sum(targets * log_softmax(logits))` per example: `[B, K], [B, K] -> [B]`."""
    return optax.softmax_cross_entropy(logits, targets)


def distillation(logits: jax.Array, teacher: jax.Array, kind: str, tau: float) -> jax.Array:
    """What a student's logits `[B, K]` lose against a teacher's, per example: `[B]`.

    "hard": cross-entropy with the teacher's decision. "soft": Kullback-Leibler divergence of the distributions at
    temperature `tau`, times `tau ** 2 / K`: DeiT's `DistillationLoss`, whose mean is over all B * K numbers.
    """
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(teacher, axis=-1))
    ours, theirs = (jax.nn.log_softmax(x / tau) for x in (logits, teacher))
    return optax.losses.kl_divergence_with_log_targets(ours, theirs) * tau**2 / logits.shape[-1]


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1.0 where the label is among the `k` largest logits (all of them, if there are fewer): `[B, K], [B] -> [B]`."""
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1).astype(jnp.float32)


def _measured(logits: jax.Array, batch: Batch, mask: jax.Array | None = None, **values: jax.Array) -> Metrics:
    """Means of `values` [B], top-1 and top-5 over the rows whose `mask` [B] is True; how many were `skipped`.

    Of five classes or fewer there is no top-5: it would be 1.
    """
    ks = (1, 5) if logits.shape[-1] > 5 else (1,)
    values |= {f"top{k}": top_k_correct(logits, batch["label"], k) for k in ks}
    averages = {name: clu_metrics.Average.from_model_output(value, mask=mask) for name, value in values.items()}
    return averages | ({"skipped": Sum.from_model_output(batch["skipped"])} if "skipped" in batch else {})


def words(values: Mapping[str, float]) -> str:
    """`loss 0.1234  top1 97.50%  ema_top1 98.00%`, and the number of skipped images if it is not 0."""
    forms = {"loss": "{} {:.4f}", "top1": "{} {:.2%}", "top5": "{} {:.2%}"}
    text = [forms[kind].format(name, value) for name, value in values.items() if (kind := name.split("_")[-1]) in forms]
    return "  ".join([*text, *options.skipped(values)])


def _open_split(config: ConfigDict, split: str) -> data.Source:
    with config_errors():
        source = data.open_source(config.data, split)
    options.check_classes(config, source.num_classes)
    return source


def _model(config: ConfigDict) -> nn.Module:
    fields = {field.name for field in dataclasses.fields(get_variant(config.model.name).model)}
    return create_model(config.model.name, **options.model_options(config, fields))


def _load_teacher(config: ConfigDict) -> tuple[nn.Module, dict]:
    """The teacher and its variables, as they are; without one None and no variables."""
    distill = config.distill
    if not distill.teacher:
        return None, {}
    log.info("reading distill.teacher: %s", distill.teacher)
    with config_errors(f"distill.teacher = {distill.teacher!r}: "):
        teacher, variables = load_pretrained(distill.teacher, distill.model or None)
    if teacher.num_classes != config.model.num_classes:
        raise ConfigError(
            f"distill.teacher = {distill.teacher!r}: expected {config.model.num_classes} classes, as "
            f"model.num_classes, it has {teacher.num_classes}"
        )
    return teacher.clone(dtype=jnp.dtype(config.model.dtype)), variables


def _without_weights(config: ConfigDict) -> Task:
    """The task with the shapes of a teacher's weights, as `distill.model` has them; the file need not be there."""
    if not config.distill.teacher and not config.model.name.endswith("_distilled"):
        return make_task(config)
    if not config.distill.model:
        raise ConfigError("distill.model = '': expected the teacher's network, where its weights are not read")
    teacher = create_model(
        config.distill.model, num_classes=config.model.num_classes, dtype=jnp.dtype(config.model.dtype)
    )
    images = jax.ShapeDtypeStruct((1, *teacher.height_width, 3), jnp.float32)
    variables = jax.eval_shape(lambda images: teacher.init(jax.random.key(0), images), images)
    return make_task(config, lambda: (teacher, variables))


def _load_initial(config: ConfigDict, model: nn.Module) -> dict | None:
    """The weights of `config.init`, with the config's head and size; None without one."""
    if not config.init:
        return None
    log.info("reading init: %s", config.init)
    with config_errors(f"init = {config.init!r}: "):
        _, variables = load_pretrained(
            config.init,
            config.model.name,
            num_classes=config.model.num_classes,
            image_size=config.data.image_size,
            seed=config.seed,
        )
    if config.model.scan:
        variables = {**variables, "params": stack_blocks(variables["params"], model.stages)}
    return variables
