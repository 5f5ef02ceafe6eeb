"""Runs a network on a golden file in either precision: one evaluation, one training step's gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import golden
from vitpyramid import create_model
from vitpyramid.weights import flax_to_torch, names, torch_to_flax


@functools.cache
def golden_run(stem: str, precision: str, taps, overrides=()):
    """Errors of the model on one golden file: `(forward errors, train errors, gradients by PyTorch name)`.

    `taps(model, variables, images)` gives `(logits, {tap: array in PyTorch's layout})`, in evaluation mode. `overrides`
    are items of options for `create_model`: those that the file's constructor had, and what turns dropout off.
    """
    reference = golden.read(stem)
    name, weights = reference.meta["variant"], reference.state_dict()
    with jax.enable_x64(precision == "float64"):
        model = create_model(name, dtype=jnp.dtype(precision), **dict(overrides))
        variables = jax.tree.map(lambda x: jnp.asarray(x, precision), torch_to_flax(name, weights))
        images = jnp.asarray(reference.images(), precision)
        logits, found = jax.jit(functools.partial(taps, model))(variables, images)
        params = variables.pop("params")
        step = jax.jit(functools.partial(loss_and_gradient, model))
        (loss, updated), grads = step(params, variables, images, jnp.array(reference.meta["labels"]))
        assert logits.dtype == loss.dtype == jnp.dtype(precision)
        grads = flax_to_torch(name, {"params": grads, **updated})  # running statistics come along
        found = {key: np.asarray(value) for key, value in found.items()}
    trainable = {key: grad for key, grad in grads.items() if key in reference.data["grad/names"]}
    assert sorted(found) == sorted(reference.meta["taps"])
    train = reference.train_errors(loss, trainable, weights)
    running = [key for key in grads if key.endswith((".running_mean", ".running_var"))]
    for key in running:
        train[f"running {key}"] = golden.relative_error(grads[key], reference.data[f"bn/{key}_f64"])
    return reference.forward_errors(logits, found), train, trainable


def loss_and_gradient(model, params, others, images, labels):
    """Mean cross-entropy in training mode, of both heads where there are two; the updated collections; the gradient."""

    def loss_function(params):
        logits, updated = model.apply({"params": params, **others}, images, train=True, mutable=list(others))
        heads = logits if isinstance(logits, tuple) else (logits,)
        losses = [optax.softmax_cross_entropy_with_integer_labels(head, labels).mean() for head in heads]
        return sum(losses) / len(losses), updated

    return jax.value_and_grad(loss_function, has_aux=True)(params)


def assert_within(errors: dict, precision: str, family: str = ""):
    """Every error is under the tolerance of its kind (`golden.TOLERANCES`)."""
    tolerances = golden.TOLERANCES[precision] | golden.TOLERANCES.get(f"{precision} {family}", {})
    too_large = {
        key: error for key, error in errors.items() if not error < tolerances.get(key.split()[0], tolerances["forward"])
    }
    assert not too_large


def random_state_dict(name: str, num_classes: int = 10, image_size: int = 32) -> dict[str, np.ndarray]:
    """Normal numbers, float32, under the PyTorch names of a model, in PyTorch's layout."""
    rng = np.random.default_rng(0)
    shapes = names.in_torch(names.model_shapes(name, num_classes, image_size))
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]`: PyTorch's bicubic (Keys' kernel, a = -0.75) along one axis, border values repeated."""
    x = np.abs((np.arange(new_size)[:, None] + 0.5) * size / new_size - 0.5 - np.arange(-2, size + 2))
    far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    matrix = np.where(x < 1, 1.25 * x**3 - 2.25 * x**2 + 1, np.where(x < 2, far, 0))
    inside = matrix[:, 2:-2].copy()
    inside[:, 0] += matrix[:, :2].sum(axis=1)
    inside[:, -1] += matrix[:, -2:].sum(axis=1)
    return inside
