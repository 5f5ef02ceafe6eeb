"""One training step and one evaluation step: pure functions, the same ones on one CPU and on a pod."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.registry import get_variant
from vitpyramid.train import mix
from vitpyramid.train.losses import cross_entropy, distillation, smooth_one_hot
from vitpyramid.train.metrics import EvalMetrics, TrainMetrics, top_k_correct
from vitpyramid.train.optim import Optimizer
from vitpyramid.train.rng import named_key
from vitpyramid.train.state import TrainState


def normalise(images: jax.Array, mean, std, dtype) -> jax.Array:
    """Pixels `[B, H, W, 3]` in 0..255 to `(x / 255 - mean) / std`, computed in at least float32, in `dtype`."""
    wide = at_least_float32(dtype)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return ((images.astype(wide) / 255 - mean) / std).astype(dtype)


def make_train_step(
    config: ConfigDict,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    teacher: nn.Module | None = None,
) -> Callable[[TrainState, dict, dict], tuple[TrainState, TrainMetrics]]:
    """`step(state, batch, teacher_variables) -> (state, metrics)`.

    `batch` is `{image: uint8 [B, H, W, 3], label: int32 [B]}`, `teacher_variables` is empty without a teacher. Images
    are mixed, erased and normalised, then go through the network in `optim.accumulate` equal parts, whose gradients
    are averaged; BatchNorm's statistics are then those of the parts.
    """
    seed, parts, prepare = config.seed, config.optim.accumulate, make_prepare(config, model.dtype)

    def loss_function(params, model_state, part, dropout_key):
        logits, model_state = model.apply(
            {"params": params, **model_state},
            part["image"],
            train=True,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )
        return training_loss(config, logits, part), (_class_logits(logits), model_state)

    def gradient(params, model_state, part, dropout_key):
        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_function, has_aux=True)(
            params, model_state, part, dropout_key
        )
        return (loss, grads), logits, model_state

    def accumulated(params, model_state, batch, dropout_key):
        """The same for a batch that takes `parts` passes."""
        # Part j is rows j, j + parts, ...: a cut by blocks would take each part from few devices.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

        def add(carry, inputs):
            total, model_state = carry
            part, index = inputs
            one, logits, model_state = gradient(params, model_state, part, jax.random.fold_in(dropout_key, index))
            return (jax.tree.map(jnp.add, total, one), model_state), logits

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (jnp.zeros(()), params))
        (total, model_state), logits = jax.lax.scan(add, (zeros, model_state), (split, jnp.arange(parts)))
        logits = jnp.moveaxis(logits, 0, 1).reshape(-1, logits.shape[-1])
        return jax.tree.map(lambda x: x / parts, total), logits, model_state

    def train_step(state: TrainState, batch: dict, teacher_variables: dict) -> tuple[TrainState, TrainMetrics]:
        key = jax.random.fold_in(named_key(seed, "mix"), state.step)
        prepared = prepare(key, batch)
        if teacher is not None:
            prepared["teacher"] = teacher.apply(teacher_variables, prepared["image"])
        dropout_key = jax.random.fold_in(named_key(seed, "dropout"), state.step)
        compute = gradient if parts == 1 else accumulated
        (loss, grads), logits, model_state = compute(state.params, state.model_state, prepared, dropout_key)
        # What is frozen has no gradient, so its backward pass is not compiled.
        grads = jax.tree.map(lambda g, moves: g if moves else jnp.zeros_like(g), grads, optimizer.trainable)
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema and _average(config, state.ema, {"params": params, **model_state}, state.step)
        metrics = TrainMetrics.single_from_model_output(
            loss=loss,
            top1=top_k_correct(logits, batch["label"], 1),
            top5=top_k_correct(logits, batch["label"], 5),
            grad_norm=optax.global_norm(grads),
            lr=schedule(state.step),
            skipped=batch.get("skipped", jnp.zeros(1)),
        )
        return TrainState(state.step + 1, params, model_state, opt_state, ema), metrics

    return train_step


def training_loss(config: ConfigDict, logits, part: dict) -> jax.Array:
    """Mean loss of a batch `{targets [B, K], ...}`; with `teacher` [B, K], its logits, as DeiT is distilled.

    `logits` are `[B, K]`, or a pair of such from a network with two heads, of which the second learns from the teacher.
    """
    loss = cross_entropy(_class_logits(logits), part["targets"])
    if "teacher" in part:
        distill = config.distill
        student = logits[1] if isinstance(logits, tuple) else logits
        taught = distillation(student, part["teacher"], distill.kind, distill.tau)
        loss = (1 - distill.alpha) * loss + distill.alpha * taught
    return loss.mean()


def make_prepare(config: ConfigDict, dtype) -> Callable[[jax.Array, dict], dict]:
    """`prepare(key, {image, label}) -> {image [B, H, W, 3] normalised, targets [B, K]}`: the random part on the device.

    DeiT's order is normalise, erase, mix; with `mix.before_normalise`, as T2T-ViT, mix, normalise, erase.
    """
    mean, std = channel_statistics(config)

    def prepare(key: jax.Array, batch: dict) -> dict:
        erase_key, mix_key = jax.random.split(key)
        images = batch["image"]
        targets = smooth_one_hot(batch["label"], config.model.num_classes, config.loss.label_smoothing)
        if config.mix.before_normalise:
            images, targets = mix.mix(mix_key, images, targets, config.mix)
        images = normalise(images, mean, std, dtype)
        images = mix.erase(erase_key, images, config.erase)
        if not config.mix.before_normalise:
            images, targets = mix.mix(mix_key, images, targets, config.mix)
        return {"image": images, "targets": targets}

    return prepare


def channel_statistics(config: ConfigDict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels: the config's, or else the network's."""
    variant = get_variant(config.model.name)
    return tuple(config.data.mean) or variant.mean, tuple(config.data.std) or variant.std


def _class_logits(logits) -> jax.Array:
    return logits[0] if isinstance(logits, tuple) else logits


def _average(config: ConfigDict, old: dict, new: dict, step: jax.Array) -> dict:
    decay = config.ema.decay
    if config.ema.warmup:
        decay = jnp.minimum(decay, (1 + step) / (10 + step))
    # Written so that what does not change stays what it is, to the bit.
    return jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), old, new)


def make_eval_step(config: ConfigDict, model: nn.Module) -> Callable[[dict, EvalMetrics, dict], EvalMetrics]:
    """`step(variables, metrics, batch) -> metrics`, which adds the examples of `batch` whose `mask` [B] is True."""
    mean, std = channel_statistics(config)

    def eval_step(variables: dict, metrics: EvalMetrics, batch: dict) -> EvalMetrics:
        logits = model.apply(variables, normalise(batch["image"], mean, std, model.dtype))
        return metrics.merge(
            EvalMetrics.single_from_model_output(
                loss=cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1])),
                top1=top_k_correct(logits, batch["label"], 1),
                top5=top_k_correct(logits, batch["label"], 5),
                mask=batch["mask"],
                skipped=batch.get("skipped", jnp.zeros_like(batch["mask"])),
            )
        )

    return eval_step
