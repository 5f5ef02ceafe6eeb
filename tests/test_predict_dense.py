"""What detectors and segmenters find in photographs: coordinates, files, pictures, the command."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from configs import quickstart
from harness import random_variables
from vitpyramid import create_model
from vitpyramid.heads.detector import Detections
from vitpyramid.tools import dense, draw, predict
from vitpyramid.weights import store

NAMES = [f"digit {i}" for i in range(10)]
CATEGORIES = dict(enumerate(NAMES, start=1))
IDS = [1, 2, 4, 7, 8, 9, 11, 40, 41, 90]  # with gaps, as a JSON of one's own may have them
RNG = np.random.default_rng(0)
WIDE, TALL = ((64, 96, 3), (192, 96, 3))


def saved(folder, entry, **network):
    """A folder as a run of the quickstart's kind leaves it, on canvases of 64 x 64; random weights."""
    config = quickstart.get_config(entry)
    config.data.eval_short_side = config.data.long_side = 64
    config.data.eval_canvas = ((64, 64),)
    network = {"name": config.model.name, "backbone": "", "num_classes": 10, "image_size": 64} | network
    variables = random_variables(create_model(**network))
    model_state = {key: value for key, value in variables.items() if key != "params"}
    state = {"step": np.int32(7), "params": variables["params"], "model_state": model_state, "ema": {}}
    about = {"classes": NAMES} | ({"category_ids": IDS} if entry == "mask" else {})
    meta = {"network": network | {"scan": False}, "ema": False, "config": config.to_dict(), "about": about}
    with store.open_checkpoints(folder) as manager:
        store.save(manager, 7, state, meta)
    return network


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, shape in (("tall.jpg", TALL), ("wide.png", WIDE)):
        image = Image.fromarray(RNG.integers(0, 256, shape, np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "tall.jpg" else 1  # turned: 96 x 192 as it is looked at
        image.save(folder / name, exif=exif)
    (folder / "broken.png").write_bytes(b"hello")
    Image.new("RGB", (9, 9)).save(folder / "wide.predicted.png")
    return folder


class Net(nn.Module):
    """Stands for a detector on canvases of 64 x 64: the same two boxes in every image, the left half of each a mask."""

    library: str = "mmdetection"

    @nn.compact
    def detect(self, images, sizes, train=False):
        n = len(images)
        boxes = jnp.tile(jnp.array([[8.0, 4, 40, 20], [0, 0, 64, 32]]), (n, 1, 1))
        masks = jnp.tile(jnp.where(jnp.arange(28) < 14, 1.0, 0.0), (n, 2, 28, 1))
        scores = jnp.tile(jnp.array([0.9, 0.4]), (n, 1))
        return Detections(boxes, scores, jnp.tile(jnp.array([3, 7]), (n, 1)), scores > 0, masks)


def stand_in(tmp_path):
    network = saved(tmp_path / "run", "mask", name="mask_rcnn_pvt_micro")
    return dataclasses.replace(dense.open_task(str(tmp_path / "run"), network), model=Net())


def test_boxes_and_masks_are_in_pixels_of_the_photograph(tmp_path, photos):
    task = stand_in(tmp_path)
    paths = [photos / name for name in ("wide.png", "broken.png", "tall.jpg")]
    found = list(dense.look(task, {}, paths, CATEGORIES, threshold=0.3, batch=2))
    assert [seen.path for seen in found] == paths
    wide, broken, turned = found
    assert broken.error.startswith("not a readable image") and not broken.results
    assert wide.image.size == (96, 64) and turned.image.size == (192, 96)
    # 96 pixels across became 64, 192 too.
    for seen, factor in ((wide, 1.5), (turned, 3)):
        best, other = seen.results
        assert best.keys() == {"image_id", "category_id", "score", "bbox", "segmentation", "name"}
        assert (best["image_id"], best["category_id"], best["name"]) == (str(seen.path), 4, "digit 3")
        assert (other["category_id"], round(other["score"], 6)) == (8, 0.4)
        corner = min(16 * factor, seen.image.height - 4 * factor)
        np.testing.assert_allclose(best["bbox"], (8 * factor, 4 * factor, 32 * factor, corner), rtol=0.03)
        mask = run_lengths.decode(best["segmentation"])
        assert mask.shape == (seen.image.height, seen.image.width)
        columns = np.flatnonzero(mask.any(axis=0))
        assert abs(columns[0] - 8 * factor) <= 1 and abs(columns[-1] + 1 - 24 * factor) <= factor
    (one,) = next(dense.look(task, {}, paths, CATEGORIES, threshold=0.5)).results
    picture = np.asarray(dense.picture(dataclasses.replace(wide, results=(one,)), NAMES)).astype(int)
    assert picture.shape == (384, 576, 3)  # six times as large
    colour = draw.palette()[1 + 3].astype(int)
    x, y, width, height = (round(6 * number) for number in one["bbox"])
    np.testing.assert_array_equal(picture[y + height // 2, x], colour)
    bottom = int(6 * (one["bbox"][1] + one["bbox"][3]) - 1)
    np.testing.assert_array_equal(picture[bottom, x + width // 2], colour)
    pixels = np.asarray(wide.image).astype(int).repeat(6, axis=0).repeat(6, axis=1)
    inside = (slice(y + 20, y + height - 2), slice(x + 2, x + width // 2 - 6))
    assert np.abs(picture[inside] - (pixels[inside] + colour) / 2).max() <= 1
    right = (slice(y + 20, y + height - 2), slice(x + width // 2 + 6, x + width - 2))
    np.testing.assert_array_equal(picture[right], pixels[right])


def test_command_writes_beside_the_images_or_into_a_folder(tmp_path, photos, monkeypatch, capsys):
    task, network = stand_in(tmp_path), {"name": "mask_rcnn_pvt_micro", "num_classes": 10}
    monkeypatch.setattr(dense, "open_task", lambda *args: task)
    monkeypatch.setattr(predict, "read_pretrained", lambda *args, **options: (network, {}))
    assert predict.main([str(photos), f"--checkpoint={tmp_path / 'run'}"]) == 2
    printed = capsys.readouterr()
    assert f"skipped {photos / 'broken.png'}" in printed.err and "digit 3" not in printed.err
    assert "  90.00%  digit 3  at " in printed.out and "digit 7" not in printed.out
    written = {f"{name}.predicted.{ending}" for name in ("wide", "tall") for ending in ("png", "json")}
    assert {path.name for path in photos.iterdir()} == {"wide.png", "tall.jpg", "broken.png"} | written
    results = json.loads((photos / "wide.predicted.json").read_text())
    assert [(result["category_id"], result["name"]) for result in results] == [(7, "digit 3")]

    out = tmp_path / "some" / "folder"
    args = [f"--checkpoint={tmp_path / 'run'}", f"--out={out}", "--threshold=0", "--json", str(photos / "wide.png")]
    assert predict.main(args) == 0
    line = json.loads(capsys.readouterr().out)
    assert [result["name"] for result in line["results"]] == ["digit 3", "digit 7"]
    assert {path.name for path in out.iterdir()} == {"wide.predicted.png", "wide.predicted.json"}
    (photos / "more").mkdir()
    Image.new("RGB", (64, 64)).save(photos / "more" / "wide.jpg")
    assert predict.main([*args, str(photos / "more")]) == 1
    assert "wide.jpg: expected other names, both become" in capsys.readouterr().err


def test_label_maps(tmp_path, photos, capsys):
    """Of a real network: the file has the levels of the classes, and the picture their colours."""
    saved(tmp_path / "run", "segment", num_classes=5)
    paths = [str(photos / name) for name in ("wide.png", "tall.jpg")]
    assert predict.main([*paths, f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path}", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == paths
    for line, name, size in zip(lines, ("wide", "tall"), ((96, 64), (192, 96)), strict=True):
        with Image.open(tmp_path / f"{name}.labels.png") as file:
            assert (file.mode, file.size) == ("P", size)
            levels = np.asarray(file)
            np.testing.assert_array_equal(np.asarray(file.convert("RGB")), draw.palette()[levels])
        shares = {of["class"]: of["share"] for of in line["classes"]}
        assert shares == {int(k): float((levels == k).mean()) for k in np.unique(levels)}
        assert {of["name"] for of in line["classes"]} == {f"class {k}" for k in shares}  # the run names ten
        report = json.loads((tmp_path / f"{name}.predicted.json").read_text())
        assert report == line | {"label_map": f"{name}.labels.png"}
        assert max(levels.ravel()) < 5


def test_how_images_are_resized(tmp_path):
    """As the run did; as the recipe says; as `--size` says."""
    network = saved(tmp_path / "run", "detect")
    assert dense.open_task(str(tmp_path / "run"), network).config.data.eval_canvas == ([64, 64],)
    network |= {"name": "retinanet_rest_small"}
    data = dense.open_task("elsewhere.pth", network).config.data
    assert (data.eval_short_side, data.long_side, data.channels, data.resize) == (800, 1333, "bgr", "detectron2")
    data = dense.open_task("elsewhere.pth", network, (500, 300)).config.data
    assert (data.eval_short_side, data.long_side) == (300, 500)
    assert set(data.eval_canvas) == {(320, 512), (512, 320)}
    task = dense.open_task("elsewhere.pth", network | {"name": "retinanet_pvt_micro", "backbone": "pit_micro"})
    assert type(task.model.backbone).__name__ == "PiT" and task.config.data.eval_short_side == 800


def test_what_is_for_others_is_refused(tmp_path, photos, capsys):
    saved(tmp_path / "run", "segment")
    image = str(photos / "wide.png")
    assert predict.main([image, f"--checkpoint={tmp_path / 'run'}", "--threshold=2"]) == 1
    assert "'2': expected a number from 0 to 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="semantic_fpn_pvt_micro: expected a classifier"):
        predict.evaluation_of(str(tmp_path / "run"), "semantic_fpn_pvt_micro")
