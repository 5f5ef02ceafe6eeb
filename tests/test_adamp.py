"""AdamP beside timm's, step by step (goldens/make_adamp.py; at these gradients all versions of timm agree)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import golden
from vitpyramid.models.backbone import Stage
from vitpyramid.train.adamp import scale_by_adamp


def draws():
    """The script's own draws; PyTorch is not needed for them."""
    source = (golden.FOLDER / "make_adamp.py").read_text().replace("import torch\n", "")
    scope = {"__file__": str(golden.FOLDER / "make_adamp.py"), "__name__": "make_adamp"}
    exec(compile(source, "make_adamp.py", "exec"), scope)
    return scope["draws"]()


def to_flax(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("fc.weight"):
        return array.T
    return array.transpose(2, 3, 1, 0) if name.endswith("conv.weight") else array


def tree(arrays: dict) -> dict:
    leaf = {"weight": "kernel", "bias": "bias", "cls_token": "cls_token"}
    return {name: {leaf[name.split(".")[-1]]: jnp.asarray(to_flax(name, a))} for name, a in arrays.items()}


def decayed(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def steps(params, gradients):
    tx = optax.chain(scale_by_adamp(0.9, 0.999, 1e-8, 0.05, decayed), optax.scale_by_learning_rate(0.01))
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def test_ten_steps_are_timms():
    with jax.enable_x64(True), np.load(golden.FOLDER / "adamp.npz") as expected:
        weights, gradients = draws()
        found = list(steps(tree(weights), [tree(grads) for grads in gradients]))
        for number, params in enumerate(found):
            right = tree({name: expected[f"{number}/{name}"] for name in weights})
            for name in weights:
                jax.tree.map(
                    lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14, err_msg=name),
                    params[name],
                    right[name],
                )


def test_the_golden_has_all_three_cases():
    """Steps of rows orthogonal to their weights and of the others differ from Adam's differently."""
    with jax.enable_x64(True):
        weights, gradients = draws()
        first = next(steps(tree(weights), [tree(gradients[0])]))
        for name, projected in (("fc.weight", False), ("flat.fc.weight", True), ("whole.fc.weight", True)):
            weight, grad = to_flax(name, weights[name]), to_flax(name, gradients[0][name])
            # Adam's first step with nesterov: sign-like, whatever the weight.
            adam = -0.01 * 1.9 * grad / (np.abs(grad) + 1e-8)
            moved = first[name]["kernel"] - weight * (1 - 0.01 * 0.05 * (0.01 if projected else 1))
            along_rows = np.abs((moved * weight).sum(axis=0)).max()
            assert np.allclose(moved, adam) != projected, name
            if name.startswith("flat"):
                assert along_rows < 1e-8  # the epsilon in the norm
            if name.startswith("whole"):
                assert along_rows > 1e-4
                assert abs((moved * weight).sum()) < 1e-8


@pytest.mark.parametrize(("scale", "cosine", "projected"), [(1e-8, 0.35, True), (1e-8, 0.4, False), (1.0, 0.3, False)])
def test_epsilon_is_added_to_each_norm(scale, cosine, projected):
    """timm 0.3.4's cosine, of a row of 9 numbers: |g.w| / (|g| + eps) / (|w| + eps) against 0.1 / 3.

    With `|g| = scale`, `eps = 1e-7` and `|w| = 1` it is the true one times 1 / 11 for the small gradient.
    """
    eps, weight = 1e-7, np.eye(1, 9)
    grad = scale * (cosine * np.eye(1, 9) + np.sqrt(1 - cosine**2) * np.eye(1, 9, 1))
    with jax.enable_x64(True):
        tx = scale_by_adamp(0.9, 0.999, eps, 0.0, decayed)
        params = {"fc": {"kernel": jnp.asarray(weight.T)}}
        step, _ = tx.update({"fc": {"kernel": jnp.asarray(grad.T)}}, tx.init(params), params)
    along = float((step["fc"]["kernel"].T @ weight.T.ravel())[0])
    assert (abs(along) < 1e-6) == projected


@pytest.mark.parametrize("name", ["blocks", "stage1"])
def test_stacked_blocks_step_like_single_ones(name):
    rng = np.random.default_rng(0)
    blocks = [
        {"fc": {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)}, "norm": {"scale": rng.normal(size=4)}}
        for _ in range(3)
    ]
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 1e-2, blocks)
    # The second one's gradient is orthogonal, the others' are not.
    weight, grad = blocks[1]["fc"]["kernel"], grads[1]["fc"]["kernel"]
    grads[1]["fc"]["kernel"] = grad - (grad * weight).sum(0) / (weight**2).sum(0) * weight
    stages = (Stage((), tuple(f"{name}_{j}" for j in range(3))),)
    with jax.enable_x64(True):
        as_tree = {f"{name}_{j}": block for j, block in enumerate(blocks)}
        single = next(steps(as_tree, [{f"{name}_{j}": grad for j, grad in enumerate(grads)}]))
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
        mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)  # noqa: E731
        tx = optax.chain(scale_by_adamp(0.9, 0.999, 1e-8, 0.05, mask, stages), optax.scale_by_learning_rate(0.01))
        params = {name: stack(blocks)}
        updates, _ = tx.update({name: stack(grads)}, tx.init(params), params)
        together = optax.apply_updates(params, updates)[name]
        for j in range(3):
            jax.tree.map(
                lambda a, b, j=j: np.testing.assert_allclose(a[j], b, rtol=1e-12), together, single[f"{name}_{j}"]
            )
