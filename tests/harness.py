"""Narrow networks of every kind, run in one program each; and a network on a golden file in either precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import golden
from vitpyramid import create_model
from vitpyramid.models.pit import PiT
from vitpyramid.models.pvt import PVT
from vitpyramid.models.regnet import RegNetY
from vitpyramid.models.rest import ResT
from vitpyramid.models.t2t_vit import GhostAttention, GhostMlp, SEAttention, T2TViT, T2TViTDense
from vitpyramid.models.vit import ViT
from vitpyramid.weights import flax_to_torch, names, torch_to_flax

SMALL = {"num_classes": 5, "image_size": 64}
STAGES = {"dims": (8, 16, 24, 32), "heads": (1, 2, 3, 4), **SMALL}
# Every kind of network there is, narrow enough to run anywhere.
NARROW = {
    "pvt": PVT((1, 1, 2, 1), **STAGES),
    "pit": PiT((1, 2, 1), (8, 16, 32), (1, 2, 4), **SMALL),
    "pit_distilled": PiT((1, 2, 1), (8, 16, 32), (1, 2, 4), distilled=True, **SMALL),
    "t2t": T2TViT(32, 2, 2, 2, **SMALL),
    "t2t_transformer": T2TViT(32, 2, 2, 2, tokens_type="transformer", **SMALL),
    "t2t_convolution": T2TViT(32, 2, 2, 2, tokens_type="convolution", **SMALL),
    # As wide as 4 units behind the ReLU.
    "t2t_se": T2TViT(64, 2, 2, 2, attention=SEAttention, **SMALL),
    "t2t_ghost": T2TViT(32, 2, 2, 3, attention=GhostAttention, mlp=GhostMlp, **SMALL),
    "t2t_dense": T2TViTDense(16, 12, 2, 2, groups=(1, 2), growth=8, **SMALL),
    "rest": ResT((1, 1, 2, 1), **STAGES),
    "deit": ViT(24, heads=3, depth=3, **SMALL),
    "deit_distilled": ViT(24, heads=3, depth=3, distilled=True, **SMALL),
    "regnety": RegNetY((1, 2, 1, 1), (8, 16, 24, 32), 8, stem_dim=8, **SMALL),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "method"))
def apply(model, variables, images, seed=0, *, train=False, method=None):
    """`model.apply` in one program; dropout draws from `seed`, updated statistics are left out."""
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, images, train=train, method=method, rngs=rngs, mutable="batch_stats")[0]


def random_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def shapes_of(model) -> dict:
    """Shapes of a model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def random_variables(model) -> dict:
    """Variables at unit scale, so that every part of the network moves the output."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[0].key == "constants" and path[-1].key == "pos_embed":
            return golden.sinusoid(*leaf.shape[1:])
        value = rng.standard_normal(leaf.shape).astype(np.float32) * float(max(0.1, np.prod(leaf.shape[:-1]) ** -0.5))
        if path[-1].key == "var":
            return 0.5 + value**2
        # Of long queries and keys, as these would be, a performer sees its guard alone.
        return 0.1 * value if "kqv" in jax.tree_util.keystr(path) else value

    return jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def modules_called(kind: type, model, train: bool) -> list:
    """Modules of class `kind` in order of their first calls."""
    modules = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, kind) and context.method_name == "__call__":
            modules.setdefault(context.module.path, context.module)
        return call(*args, **kwargs)

    options = {"train": train, "rngs": {"dropout": jax.random.key(0)}, "mutable": "batch_stats"}
    run, variables = functools.partial(model.apply, **options), shapes_of(model)
    with nn.intercept_methods(record):
        jax.eval_shape(run, variables, random_images(2, 64, 64))
    return list(modules.values())


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


def linear_matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]`: PyTorch's bilinear `interpolate(align_corners=False)` along one axis."""
    matrix = np.zeros((new_size, size))
    for out in range(new_size):
        source = max((out + 0.5) * size / new_size - 0.5, 0.0)
        low = int(source)
        high = min(low + 1, size - 1)
        matrix[out, low] += 1 - (source - low)
        matrix[out, high] += source - low
    return matrix
