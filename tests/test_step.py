"""One step: its arithmetic, its randomness, and that any mesh takes the same one."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from vitpyramid.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from vitpyramid.tasks import make_task
from vitpyramid.tasks.classify import smooth_one_hot, top_k_correct
from vitpyramid.tasks.metrics import compute
from vitpyramid.tasks.prepare import normalise
from vitpyramid.train import program as programs
from vitpyramid.train.optim import Optimizer
from vitpyramid.train.sharding import abstract_state, batch_sharding, make_mesh, state_sharding
from vitpyramid.train.state import create_state, initial_state, initial_variables
from vitpyramid.train.step import make_eval_step, make_train_step


def small_config(family="pvt", **changes):
    config = quickstart.get_config(family)
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return config


def task_of(config):
    """The task of a config, as if its training split had 160 examples."""
    return dataclasses.replace(make_task(config), num_examples=lambda: 160)


def batches(config, count):
    rng = np.random.default_rng(0)
    size = config.data.image_size
    for _ in range(count):
        image = rng.integers(0, 256, (config.batch_size, size, size, 3), dtype=np.uint8)
        yield {"image": image, "label": rng.integers(0, 10, config.batch_size, dtype=np.int32)}


@functools.cache
def step_zero(family="pvt"):
    """State of step 0 with dropout, drop path and an average, on the host, and the program it is of.

    The network has one block a stage: more take longer to compile, and are like it.
    """
    config = small_config(family, **{"model.drop_rate": 0.1, "model.drop_path_rate": 0.2, "ema.decay": 0.9})
    mesh = make_mesh(1, jax.devices()[:1])
    task = make_task(config)
    shallow = {"depth": 1} if family == "t2t_vit" else {"depths": (1,) * len(task.model.depths)}
    task = dataclasses.replace(task, model=task.model.clone(**shallow))
    # A rate of 1 subtracts the gradient, so that states show it; Adam would divide rounding noise by itself.
    tx = optax.sgd(1.0)

    def init():
        return initial_state(initial_variables(task, 1), tx, average=True)

    shapes = jax.eval_shape(init)
    optimizer = Optimizer(tx, jax.tree.map(lambda _: True, shapes.params))
    with jax.set_mesh(mesh):
        state = create_state(init, abstract_state(mesh, shapes))
    return task, jax.device_get(state), make_train_step(task, optimizer, lambda step: 1.0)


@functools.cache
def two_steps(devices, fsdp, family="pvt"):
    """Losses and gradient norms of two steps from step 0 on a mesh, and the state after each."""
    task, start, train_step = step_zero(family)
    mesh = make_mesh(fsdp, jax.devices()[:devices])
    step = jax.jit(train_step)
    with jax.set_mesh(mesh):
        state = jax.device_put(start, state_sharding(mesh, start))
        metrics, states = [], []
        for batch in batches(task.config, 2):
            state, measured = step(state, jax.device_put(batch, batch_sharding(mesh)), {})
            metrics.append(compute(measured))
            states.append(jax.device_get(state))
    return metrics, states, step


@pytest.mark.parametrize(
    ("family", "devices", "fsdp"),
    [("pvt", 8, 8), ("pit", 8, 4), ("t2t_vit", 8, 8), ("rest", 8, 2)],
)
def test_any_mesh_takes_the_same_step(family, devices, fsdp):
    """With dropout and, in ResT, batch norm over the whole batch. PiT and T2T-ViT have nothing else that rows share."""
    _, start, _ = step_zero(family)
    expected, expected_states, _ = two_steps(1, 1, family)
    seen, states, _ = two_steps(devices, fsdp, family)
    assert seen[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert seen[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)
    gradient, expected_gradient = (
        jax.tree.map(np.subtract, start.params, s.params) for s in (states[0], expected_states[0])
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=0, atol=2e-6 * largest)
    chex.assert_trees_all_close(states[0].model_state, expected_states[0].model_state, rtol=2e-6, atol=1e-6)


def test_parameters_and_moments_are_split_over_fsdp():
    config = small_config()
    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        state = programs.build(task_of(config), mesh).state
    whole = sum(leaf.size for leaf in jax.tree.leaves(state))
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert held < 0.35 * whole
    kernel = state.params["block4_0"]["mlp"]["fc1"]["kernel"]
    moment = state.opt_state[1].mu["block4_0"]["mlp"]["fc1"]["kernel"]
    assert (
        kernel.sharding == moment.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    )


def test_arrays_that_do_not_divide_stay_whole():
    mesh = make_mesh(8)
    leaf = jax.ShapeDtypeStruct((1001, 333), jnp.float32)
    assert state_sharding(mesh, leaf).is_fully_replicated


def test_dropout_is_a_function_of_the_step():
    task, start, _ = step_zero()
    metrics, states, step = two_steps(1, 1)
    mesh = make_mesh(1, jax.devices()[:1])
    batch = next(batches(task.config, 1))
    with jax.set_mesh(mesh):
        again, measured = step(jax.device_put(start, state_sharding(mesh, start)), batch, {})
        later, measured_later = step(
            jax.device_put(start.replace(step=np.int32(7)), state_sharding(mesh, start)), batch, {}
        )
    assert compute(measured)["loss"] == metrics[0]["loss"]
    chex.assert_trees_all_equal(jax.device_get(again), states[0])
    assert compute(measured_later)["loss"] != metrics[0]["loss"]
    assert later.step == 8


def test_average_follows_the_weights():
    """After the first step: 0.9 * start + 0.1 * new, and so on."""
    _, start, _ = step_zero()
    _, (first, second), _ = two_steps(1, 1)
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start.params, first.params)
    chex.assert_trees_all_close(first.ema["params"], average, rtol=1e-5, atol=1e-6)
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, average, second.params)
    chex.assert_trees_all_close(second.ema["params"], average, rtol=1e-5, atol=1e-6)


def test_no_average_unless_asked_for():
    assert programs.build(task_of(small_config()), make_mesh(1)).state.ema == {}


def test_normalise():
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3) * 5
    expected = (image / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(
        normalise(image, IMAGENET_MEAN, IMAGENET_STD, jnp.float32), expected, rtol=2e-6, atol=1e-6
    )
    assert normalise(image, IMAGENET_MEAN, IMAGENET_STD, jnp.bfloat16).dtype == jnp.bfloat16


def test_label_smoothing():
    targets = smooth_one_hot(jnp.array([2]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)


def test_top_k():
    logits = jnp.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    labels = jnp.array([2, 2])
    assert top_k_correct(logits, labels, 1).tolist() == [0, 0]
    assert top_k_correct(logits, labels, 2).tolist() == [1, 0]
    assert top_k_correct(logits, labels, 5).tolist() == [1, 1]
    # A network that answers the same for every class has not found the label.
    assert top_k_correct(jnp.zeros((4, 10)), jnp.array([3, 5, 7, 9]), 1).tolist() == [0, 0, 0, 0]


def test_evaluation_ignores_what_is_masked():
    task, start, _ = step_zero()
    variables = start.variables
    batch = {**next(batches(task.config, 1)), "mask": np.arange(16) < 5}
    metrics = compute(jax.device_get(jax.jit(make_eval_step(task))(variables, batch)))
    logits = jax.jit(task.model.apply)(variables, normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD, jnp.float32))
    log_probabilities = jax.nn.log_softmax(logits)[np.arange(16), batch["label"]]
    assert metrics["loss"] == pytest.approx(-float(log_probabilities[:5].mean()), rel=1e-5)
    assert metrics["top1"] == pytest.approx(float((logits.argmax(-1) == batch["label"])[:5].mean()))
