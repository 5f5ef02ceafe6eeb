"""One training step and one evaluation step: pure functions, the same ones on one CPU and on a pod."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from clu import metrics
from ml_collections import ConfigDict

from vitpyramid.tasks.metrics import Metrics
from vitpyramid.tasks.task import Batch, Task
from vitpyramid.train.optim import Optimizer
from vitpyramid.train.rng import named_key
from vitpyramid.train.state import TrainState


def make_train_step(
    task: Task, optimizer: Optimizer, schedule: optax.Schedule
) -> Callable[[TrainState, Batch, dict], tuple[TrainState, Metrics]]:
    """`step(state, batch, constants) -> (state, metrics)`.

    The batch is prepared as a whole and goes through the network in `optim.accumulate` equal parts, whose gradients are
    averaged; BatchNorm's statistics are then those of the parts. Metrics are the task's, and `loss`, `grad_norm`, `lr`.
    """
    seed, parts = task.config.seed, task.config.optim.accumulate

    def loss_function(params, model_state, x, targets, dropout_key):
        outputs, model_state = task.model.apply(
            {"params": params, **model_state},
            x,
            train=True,
            method=task.call,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )
        loss, measured = task.loss(outputs, targets)
        return loss, (measured, model_state)

    def gradient(params, model_state, rows, dropout_key):
        (loss, (measured, model_state)), grads = jax.value_and_grad(loss_function, has_aux=True)(
            params, model_state, *rows, dropout_key
        )
        return (loss, grads), measured, model_state

    def accumulated(params, model_state, rows, dropout_key):
        """The same for a batch that takes `parts` passes."""
        # Part j is rows j, j + parts, ...: a cut by blocks would take each part from few devices.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), rows)

        def add(carry, inputs):
            total, model_state = carry
            part, index = inputs
            one, measured, model_state = gradient(params, model_state, part, jax.random.fold_in(dropout_key, index))
            return (jax.tree.map(jnp.add, total, one), model_state), measured

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (jnp.zeros(()), params))
        (total, model_state), measured = jax.lax.scan(add, (zeros, model_state), (split, jnp.arange(parts)))
        measured = {name: metric.reduce() for name, metric in measured.items()}
        return jax.tree.map(lambda x: x / parts, total), measured, model_state

    def train_step(state: TrainState, batch: Batch, constants: dict) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(named_key(seed, "mix"), state.step)
        rows = task.prepare(key, batch, constants)
        dropout_key = jax.random.fold_in(named_key(seed, "dropout"), state.step)
        compute = gradient if parts == 1 else accumulated
        (loss, grads), measured, model_state = compute(state.params, state.model_state, rows, dropout_key)
        # What is frozen has no gradient, so its backward pass is not compiled.
        grads = jax.tree.map(lambda g, moves: g if moves else jnp.zeros_like(g), grads, optimizer.trainable)
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema and _average(task.config.ema, state.ema, {"params": params, **model_state}, state.step)
        measured = {
            "loss": metrics.Average.from_model_output(loss),
            **measured,
            "grad_norm": metrics.Average.from_model_output(optax.global_norm(grads)),
            "lr": metrics.LastValue.from_model_output(jnp.asarray(schedule(state.step))),
        }
        return TrainState(state.step + 1, params, model_state, opt_state, ema), measured

    return train_step


def _average(config: ConfigDict, old: dict, new: dict, step: jax.Array) -> dict:
    decay = jnp.minimum(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay
    # Written so that what does not change stays what it is, to the bit.
    return jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), old, new)


def make_eval_step(task: Task) -> Callable[[dict, Batch], Metrics]:
    """`step(variables, batch) -> metrics`."""

    def eval_step(variables: dict, batch: Batch) -> Metrics:
        outputs = task.model.apply(variables, task.prepare_eval(batch), train=False, method=task.call)
        return task.measure(outputs, batch)

    return eval_step
