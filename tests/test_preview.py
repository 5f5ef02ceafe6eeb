"""vitpyramid.tools.preview."""

import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from vitpyramid import data
from vitpyramid.tasks.dense import open_split
from vitpyramid.tools import preview


def test_sheet_places_images_in_rows():
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 128, 3), np.uint8)
    page = np.asarray(preview.sheet("title", images, list("abcde")))
    # 64 x 128 enlarged to 128 x 256, a line of 14 and gaps of 4: 260 across and 146 down; two columns, three rows
    assert page.shape == (3 * 146 + 22, 2 * 260 + 4, 3)
    for i, image in enumerate(images):
        top, left = 22 + i // 2 * 146, 4 + i % 2 * 260
        np.testing.assert_array_equal(page[top : top + 128 : 2, left : left + 256 : 2], image)
        assert page[top + 128 : top + 142, left : left + 20].min() < 128  # the caption
    assert page[4:18, 4:40].min() < 128  # the title
    assert (page[-146:, 270:] == 255).all()  # no sixth image


def test_large_images_are_not_enlarged():
    page = preview.sheet("", np.zeros((1, 224, 224, 3), np.uint8), [""])
    assert page.size == (224 + 8, 224 + 14 + 4 + 14 + 8)


@pytest.fixture
def config(data_dir):
    config = quickstart.get_config()
    config.data.data_dir = data_dir
    config.data.threads = 1
    config.mix.mixup = config.mix.cutmix = config.erase.prob = 0.0
    return config


def first_batch(config, count):
    config = config.copy_and_resolve_references()
    config.batch_size = count
    stream = data.make_train(config, data.open_source(config.data, "train"))
    batch = next(stream)
    stream.close()
    return batch


@pytest.mark.parametrize("count", [2, 400])  # digits has 360 test images
def test_halves_are_the_streams(config, monkeypatch, count):
    sheets = []
    original = preview.sheet
    monkeypatch.setattr(preview, "sheet", lambda *args: sheets.append(args) or original(*args))
    preview.preview(config, count)
    expected = first_batch(config, count)
    title, images, captions = sheets[0]
    assert title == "training: digits, train"
    np.testing.assert_array_equal(images, expected["image"])
    assert captions == [str(label) for label in expected["label"]]
    title, images, captions = sheets[1]
    assert title == "evaluation: digits, test" and len(images) == len(captions) == min(count, 360)


def test_mixed_images_and_weights(config):
    config.mix.mixup, config.mix.cutmix, config.mix.prob, config.mix.mode = 1.0, 0.0, 1.0, "batch"
    config.loss.label_smoothing = 0.1
    plain = first_batch(config, 6)
    images, captions = preview.training_images(preview.small_task(config, 6))
    assert sorted(plain["label"][[0, -1]]) == sorted(int(part.split()[0]) for part in captions[0].split(", "))
    kept = {int(part.split()[0]): float(part.split()[1]) for part in captions[0].split(", ")}[plain["label"][0]]
    assert 0.01 < kept < 0.99
    mixed = kept * plain["image"][0].astype(float) + (1 - kept) * plain["image"][-1]
    assert np.abs(images[0] - mixed).max() <= 255 * 0.005 + 0.5  # the weight has two digits


def test_erased_images(config):
    config.erase.prob, config.erase.mode = 1.0, "const"
    plain = first_batch(config, 6)["image"]
    images, _ = preview.training_images(preview.small_task(config, 6))
    for image, original in zip(images, plain, strict=True):
        assert 0.005 < (image != original).any(-1).mean() < 0.4


def dense(entry, **changes):
    config = quickstart.get_config(entry)
    data = config.data
    data.train_split, data.eval_split = "train[:6]", "test[:2]"
    data.short_side, data.long_side, data.eval_short_side = (96,), 96, 96
    data.canvas = data.eval_canvas = ((96, 96),)
    config.update_from_flattened_dict(changes)
    return config


def test_boxes_and_masks_that_are_learned():
    task = preview.small_task(dense("mask", **{"data.channels": "bgr"}), 3)
    tiles, captions = preview.training_images(task)
    batches = task.train_batches(0)
    batch = next(batches)
    batches.close()
    assert tiles.shape == (3, 288, 288, 3)  # three times 96
    for tile, caption, image, boxes, labels, valid, masks in zip(
        tiles, captions, *(batch[name] for name in ("image", "boxes", "labels", "valid", "masks")), strict=True
    ):
        assert caption == ", ".join(str(label) for label in labels[valid])
        masks = np.unpackbits(masks[valid], axis=-1, count=96).astype(bool)
        outside, small = ~masks.any(axis=0), tile[1::3, 1::3].astype(int)
        for x1, y1, x2, y2 in boxes[valid].round().astype(int):  # with captions above them, or inside
            outside[max(y1 - 8, 0) : y2 + 2, max(x1 - 8, 0) : x2 + 8] = False
        assert outside.mean() > 0.2 and np.abs(small - image)[outside & image.any(-1)].max() <= 1
        last = np.flatnonzero(valid)[-1]
        half = (image[masks[-1]] + preview.draw.palette()[1 + labels[last]].astype(int)) / 2
        assert np.median(np.abs(small[masks[-1]] - half)) <= 1


def test_label_maps_that_are_learned():
    task = preview.small_task(dense("segment"), 2)
    tiles, captions = preview.training_images(task)
    batches = task.train_batches(0)
    batch = next(batches)
    batches.close()
    known = batch["label"] != 255
    colours = preview.draw.palette()[batch["label"]].astype(int)
    small = tiles[:, 1::3, 1::3].astype(int)
    assert np.abs(small - (batch["image"] + colours) / 2)[known].max() <= 1
    assert np.abs(small - 255 * np.array((0.485, 0.456, 0.406)))[~known].max() <= 1  # where images are zero
    names = ["ground", *"0123456789"]
    assert captions == [", ".join(names[k] for k in np.unique(labels[labels < 255])) for labels in batch["label"]]
    tiles, captions = preview.evaluation_images(task)
    height, width = open_split(task.config, False).sizes()[0]
    assert tiles.shape == (2, 288, 288, 3) and captions[0].endswith(f" of {height} x {width}")


def test_caption():
    assert preview.caption(np.array([0, 0, 1.0]), ["cat", "dog", "owl"]) == "owl"
    assert preview.caption(np.array([0.25, 0, 0.75]), ["cat", "dog", "owl"]) == "owl 0.75, cat 0.25"


def test_captions_keep_to_their_tile():
    page = np.asarray(preview.sheet("", np.full((2, 128, 128, 3), 255, np.uint8), ["Möwe ☃ " * 20, ""]))
    dark = (page < 128).any(axis=(0, 2))
    assert dark[4:132].any() and not dark[132:].any()


def test_command_writes_a_png(data_dir, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    preview.main(["--config=configs/quickstart.py", f"--config.data.data_dir={data_dir}", f"--out={out}", "--count=3"])
    with Image.open(out) as page:
        assert page.format == "PNG" and f"{page.width} x {page.height}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--count=0"], "--count=0"), (["--out=nowhere/x.png"], "no folder nowhere"), (["--config.seed=x"], "seed")],
)
def test_command_refuses(args, message, capsys):
    with pytest.raises(SystemExit) as caught:
        preview.main(["--config=configs/quickstart.py", *args])
    assert caught.value.code == 2 and message in capsys.readouterr().err
