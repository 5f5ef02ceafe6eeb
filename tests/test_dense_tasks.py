"""Detection and segmentation as tasks: what a step is given, what comes out, on the loop that classification has."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import soak
from configs import base, quickstart
from vitpyramid.heads import registry, semantic_fpn
from vitpyramid.tasks import dense, detect, make_task, segment
from vitpyramid.train import loop
from vitpyramid.train.config import ConfigError, validate
from vitpyramid.weights import store
from vitpyramid.weights.dense_start import Started
from vitpyramid.weights.intact import newest_intact
from vitpyramid.weights.names import model_shapes
from vitpyramid.weights.store import write_weights


def tiny(entry, **changes):
    """A run of the quickstart's kind that takes seconds: 64 x 64 canvases, few examples."""
    config = quickstart.get_config(entry)
    config.update_from_flattened_dict(
        {
            "batch_size": 8,
            "epochs": 1.0,
            "seed": 1,
            "compile_cache": "",
            "log.every_steps": 1,
            "data.train_split": "train[:48]",
            "data.eval_split": "test[:12]",
            "data.short_side": (64,),
            "data.long_side": 64,
            "data.eval_short_side": 64,
            "data.canvas": ((64, 64),),
            "data.eval_canvas": ((64, 64),),
            "eval.batch_size": 8,
            "eval.every_epochs": 1.0,
            "checkpoint.every_epochs": 0.5,
            **changes,
        }
    )
    return config


@pytest.mark.parametrize("entry", ("detect", "detr", "mask", "segment"))
def test_batches_are_as_the_task_says(entry):
    config = tiny(entry)
    validate(config, base.get_config(), 8)
    task = make_task(config)
    for evaluation, batch in ((False, next(task.train_batches(0))), (True, next(iter(task.eval_batches())))):
        expected = {name: (leaf.shape, leaf.dtype) for name, leaf in task.batch(evaluation).items()}
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == expected


def test_the_batch_is_that_of_the_largest_canvas():
    config = tiny("detect", **{"data.canvas": ((48, 64), (64, 64), (64, 48)), "data.eval_canvas": ()})
    task = make_task(config)
    assert task.batch(False)["image"].shape == task.batch(True)["image"].shape == (8, 64, 64, 3)


def test_canvases_are_zero_beyond_the_image():
    config = tiny("detect", **{"data.channels": "bgr", "data.mean": (0.0, 0.0, 0.2), "data.std": (0.5, 0.5, 0.5)})
    pixels = np.full((2, 4, 6, 3), (51, 102, 255), np.uint8)
    images = dense.canvas({"image": pixels, "size": np.array([[4, 6], [2, 5]])}, config, jnp.float32)
    np.testing.assert_allclose(images[0, 0, 0], (2.0, 0.8, 0.0), atol=1e-6)  # blue, green, red
    assert (images[0] == images[0, 0, 0]).all()
    assert not images[1, 2:].any() and not images[1, :, 5:].any() and images[1, :2, :5, :2].all()


def test_class_maps_are_those_of_two_resizes():
    """Of images that fill the canvas, against the resizes one after the other; of a smaller one, against its own."""
    rng = np.random.default_rng(0)
    logits = jnp.float32(rng.normal(size=(2, 16, 24, 7)))
    canvas, originals, sizes = (64, 96), np.array([[50, 75], [80, 61]]), np.array([[64, 96], [64, 64]])
    maps = jax.jit(segment.class_maps, static_argnums=(3, 4))(logits, sizes, originals, canvas, (96, 80))
    assert maps.shape == (2, 96, 80) and maps.dtype == jnp.uint8
    whole = semantic_fpn.probabilities(logits[:1], canvas, (50, 75)).argmax(-1)
    part = semantic_fpn.probabilities(logits[1:, :, :16], (64, 64), (80, 61)).argmax(-1)
    assert (maps[0, :50, :75] != whole[0]).mean() < 1e-3  # where two classes are as likely, to rounding
    assert (maps[1, :80, :61] != part[0]).mean() < 1e-3


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def detector():
    """A run of a RetinaNet that detects something from the first step on."""
    task = make_task(tiny("detect"))
    return dataclasses.replace(task, model=task.model.clone(score_threshold=0.0))


def killed_run(workdir):
    """Ends this process after step 4, when the checkpoint of step 3 is written."""

    def kill(record):
        while record["step"] == 4 and newest_intact(workdir / store.FOLDER) != 3:
            time.sleep(0.01)
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(detector(), workdir, callback=kill)


def test_a_detector_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """RetinaNet on eight devices; AP is of what all of them found."""
    task, whole, parts = detector(), tmp_path / "whole", tmp_path / "parts"
    summary = loop.train(task, whole)
    assert summary.metrics["detections"] > 0 and -1 <= summary.metrics["box_AP"] <= 1
    written = json.loads((whole / "detections.bbox.json").read_text())
    assert len(written) == summary.metrics["detections"]
    listed = {image["id"] for image in dense.open_split(task.config, False).ground_truth()["images"]}
    assert {result["image_id"] for result in written} <= listed and len(listed) == 12
    assert (whole / "classes.txt").read_text().splitlines()[0].split() == ["category", "box", "AP"]

    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir or ""
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    program = f"import conftest, pathlib, test_dense_tasks as t; t.killed_run(pathlib.Path({str(parts)!r}))"
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
    assert [record["step"] for record in records(parts)] == [1, 2, 3, 4]

    assert loop.train(task, parts).metrics == summary.metrics
    assert soak.differing(soak.arrays(parts, 6), soak.arrays(whole, 6)) == []
    losses = [[record.get("train/loss") for record in records(folder)] for folder in (parts, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert loop.evaluate_checkpoint(task, parts) == (6, summary.metrics)


def test_losses_are_summed_and_named():
    counted = dense.counted({"dropped": jnp.array([0, 3]), "size": jnp.ones((2, 2))})
    total, metrics = dense.loss({"loss_cls": jnp.array([1.0, 2.0]), "loss_bbox": jnp.array(0.5)}, counted)
    assert (total, metrics["loss_cls"].compute(), set(metrics)) == (3.5, 3.0, {"loss_cls", "loss_bbox", "dropped"})
    values = {"loss": 1.0, "box_AP": 0.367, "box_APs": 0.2, "ema_mask_AP50": 0.5, "skipped": 2.0}
    assert detect.words(values | {"dropped": float(metrics["dropped"].compute())}) == (
        "loss 1.0000  box_AP 36.7  ema_mask_AP50 50.0  3 objects beyond data.max_boxes  2 images skipped"
    )
    assert segment.words({"mIoU": 0.419, "loss": 2.0, "loss_seg": 2.0}) == "loss 2.0000  mIoU 41.90"


def test_from_a_classifier(tmp_path, caplog, monkeypatch):
    """Its weights are read with position tables of the config's size; what does not fit is named."""
    shapes = model_shapes("pvt_micro", 10, 32)
    variables = traverse_util.unflatten_dict({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
    write_weights(tmp_path, {"name": "pvt_micro", "num_classes": 10, "image_size": 32}, variables)
    config = tiny("detect", init=str(tmp_path), **{"data.image_size": 96})
    task = make_task(config)
    given = []

    def from_classifier(*args):
        given.append(args)
        return Started({"params": {}}, ["params/backbone/head/kernel"], ["params/neck/a", "params/neck/b"])

    monkeypatch.setattr(dense, "from_classifier", from_classifier)
    with caplog.at_level(logging.INFO, logger="vitpyramid"):
        assert task.initial() == {"params": {}}
    ((model, weights, seed),) = given
    assert (model, seed, weights["params"]["pos_embed1"].shape) == (task.model, 1, (1, 24 * 24, 32))
    assert [record.getMessage() for record in caplog.records][1:] == [
        "init: retinanet_pvt_micro has no place for backbone/head/kernel",
        "init: retinanet_pvt_micro begins anew with neck",
    ]
    config.init = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="init = "):
        make_task(config).initial()


def test_from_a_whole_network(monkeypatch):
    """With the config's classes, size and backbone; what fits neither reading is told of both."""
    asked = []

    def load_pretrained(init, name, **wanted):
        asked.append((init, name, wanted))
        if init == "unfit":
            raise ValueError(f"no {name}")
        return None, {"params": {"neck": 1}}

    monkeypatch.setattr(dense, "load_pretrained", load_pretrained)
    config = tiny("detect", **{"init": "whole", "model.backbone": "pit_micro", "data.image_size": 96})
    assert make_task(config).initial() == {"params": {"neck": 1}}
    wanted = {"num_classes": 10, "image_size": 96, "seed": 1, "backbone": "pit_micro"}
    assert asked == [("whole", "retinanet_pvt_micro", wanted)]
    config.init = "unfit"
    with pytest.raises(ConfigError) as error:
        make_task(config).initial()
    assert str(error.value) == (
        "init = 'unfit': neither weights of retinanet_pvt_micro: no retinanet_pvt_micro\nnor of pit_micro: no pit_micro"
    )


def test_configs_that_cannot_be_run():
    for entry, changes, message in (
        ("mask", {"data.masks": False}, "data.masks = False: expected True with mask_rcnn_pvt_micro"),
        ("detect", {"model.name": "pvt_micro"}, "model.name = 'pvt_micro': expected one of retinanet_pvt_tiny"),
        ("segment", {"model.name": "retinanet_pvt_micro"}, "expected one of semantic_fpn_pvt_tiny"),
        ("detect", {"model.backbone": "pvt_macro"}, "model.backbone = 'pvt_macro': expected the name of a backbone"),
        ("detect", {"loss.images_per_group": 3}, "loss.images_per_group = 3: expected a divisor of the 8 images"),
        ("detect", {"data.canvas": ((64, 16),)}, "data.canvas = [[64, 16]]: expected (height, width) pairs"),
        ("detect", {"data.resize": "mmcv"}, "data.resize = 'mmcv': expected one of 'mmdet'"),
    ):
        with pytest.raises(ConfigError, match="cannot be run") as error:
            validate(tiny(entry, **changes), base.get_config(), 1)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="model.num_classes = 9: expected 10"):
        make_task(tiny("detect", **{"model.num_classes": 9})).num_examples()
    assert make_task(tiny("segment", **{"model.num_classes": 0})).config.model.num_classes == 11


def test_another_backbone_under_the_heads():
    config = tiny("detect", **{"model.backbone": "pit_micro"})
    model = make_task(config).model
    assert type(model.backbone).__name__ == "PiT" and isinstance(model, registry.RetinaNet)
