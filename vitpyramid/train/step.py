"""One training step and one evaluation step: pure functions, the same ones on one CPU and on a pod."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vitpyramid.models.layers import at_least_float32
from vitpyramid.models.registry import get_variant
from vitpyramid.train.losses import cross_entropy, smooth_one_hot
from vitpyramid.train.metrics import EvalMetrics, TrainMetrics, top_k_correct
from vitpyramid.train.rng import named_key
from vitpyramid.train.state import TrainState


def normalise(images: jax.Array, mean, std, dtype) -> jax.Array:
    """uint8 `[B, H, W, 3]` to `(x / 255 - mean) / std`, computed in at least float32, in `dtype`."""
    wide = at_least_float32(dtype)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return ((images.astype(wide) / 255 - mean) / std).astype(dtype)


def make_train_step(
    config: ConfigDict, model: nn.Module, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, dict], tuple[TrainState, TrainMetrics]]:
    """`step(state, batch) -> (state, metrics)` for `batch = {image: uint8 [B, H, W, 3], label: int32 [B]}`."""
    variant = get_variant(config.model.name)
    num_classes, smoothing = config.model.num_classes, config.loss.label_smoothing
    seed, ema_decay = config.seed, config.ema.decay

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, TrainMetrics]:
        images = normalise(batch["image"], variant.mean, variant.std, model.dtype)
        targets = smooth_one_hot(batch["label"], num_classes, smoothing)
        dropout_key = jax.random.fold_in(named_key(seed, "dropout"), state.step)

        def loss_function(params):
            logits, model_state = model.apply(
                {"params": params, **state.model_state},
                images,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=list(state.model_state),
            )
            return cross_entropy(logits, targets).mean(), (logits, model_state)

        (loss, (logits, model_state)), grads = jax.value_and_grad(loss_function, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            # Written so that what does not change stays what it is, to the bit.
            variables = {"params": params, **model_state}
            ema = jax.tree.map(lambda old, new: old + (1 - ema_decay) * (new - old), ema, variables)
        metrics = TrainMetrics.single_from_model_output(
            loss=loss,
            top1=top_k_correct(logits, batch["label"], 1),
            top5=top_k_correct(logits, batch["label"], 5),
            grad_norm=optax.global_norm(grads),
            lr=schedule(state.step),
        )
        return TrainState(state.step + 1, params, model_state, opt_state, ema), metrics

    return train_step


def make_eval_step(config: ConfigDict, model: nn.Module) -> Callable[[dict, EvalMetrics, dict], EvalMetrics]:
    """`step(variables, metrics, batch) -> metrics`, which adds the examples of `batch` whose `mask` [B] is True."""
    variant = get_variant(config.model.name)

    def eval_step(variables: dict, metrics: EvalMetrics, batch: dict) -> EvalMetrics:
        logits = model.apply(variables, normalise(batch["image"], variant.mean, variant.std, model.dtype))
        return metrics.merge(
            EvalMetrics.single_from_model_output(
                loss=cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1])),
                top1=top_k_correct(logits, batch["label"], 1),
                top5=top_k_correct(logits, batch["label"], 5),
                mask=batch["mask"],
            )
        )

    return eval_step
