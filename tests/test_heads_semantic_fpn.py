"""Semantic FPN against mmsegmentation, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dense_golden import DenseGolden, generator
from dense_networks import backbone, nchw, two_devices
from vitpyramid import create_model
from vitpyramid.heads.semantic_fpn import IGNORED, probabilities
from vitpyramid.weights.dense_names import from_state_dict, to_state_dict

EXACT = 1e-9


def labels_of(meta: dict) -> np.ndarray:
    """int `[2, H, W]`: squares of 8 pixels, some rows and columns ignored."""
    height, width = meta["size"]
    cells = -(-height // 8), -(-width // 8)
    labels = generator(meta["seed"], "labels").randint(0, meta["num_classes"], (2, 1, *cells))[:, 0]
    labels = labels.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    labels[:, :6] = IGNORED
    labels[1, :, -9:] = IGNORED
    return labels


def test_original():
    with jax.enable_x64(True):
        golden = DenseGolden("semantic_fpn_pvt")
        meta, weights = golden.meta, golden.state_dict()
        model = create_model(
            "semantic_fpn_pvt_small",
            backbone=backbone(meta),
            num_classes=meta["num_classes"],
            channels=meta["fpn_channels"],
            head_channels=meta["head_channels"],
            head_drop_rate=0.0,
            dtype=jnp.float64,
        )
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), from_state_dict(model, weights))
        images = jnp.asarray(golden.input("image").transpose(0, 2, 3, 1), jnp.float64)
        size, original = tuple(meta["size"]), tuple(meta["ori_shape"])

        def levels_and_logits(model):
            levels = model.pyramid(images)
            return levels, model.decode_head(levels, False)

        @jax.jit
        def evaluate(variables):
            levels, logits = model.apply(variables, method=levels_and_logits)
            return levels, logits, probabilities(logits, size, original)

        @jax.jit
        def train(params, others, images, labels):
            def loss(params):
                found, updated = model.apply(
                    {"params": params, **others}, images, labels, method="losses", mutable=list(others)
                )
                return found["loss_seg"], updated

            return jax.value_and_grad(loss, has_aux=True)(params)

        levels, logits, of_original = evaluate(variables)
        params = variables.pop("params")
        with two_devices() as split:
            (loss, updated), gradients = train(params, variables, *split((images, labels_of(meta))))
        gradients = to_state_dict(model, {"params": gradients, **updated})

    for i, level in enumerate(levels):
        assert golden.error(f"eval/neck{i}", nchw(level.x)) < EXACT
    assert golden.error("eval/logits_stride4", nchw(logits)) < EXACT
    assert golden.error("eval/probabilities_ori", nchw(of_original)) < EXACT
    assert (np.argmax(of_original, -1) == golden.array("eval/prediction_ori")).all()
    assert golden.error("loss/decode.loss_seg", loss[None]) < EXACT
    errors = golden.gradient_errors(gradients, weights)
    assert max(errors.values()) < EXACT, errors
    running = [key for key in golden.data if key.startswith("bn/")]
    assert len(running) == 14
    assert all(golden.error(key, gradients[key.removeprefix("bn/")]) < EXACT for key in running)
