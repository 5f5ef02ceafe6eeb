"""Predictions against what a few plain lines compute, images of all kinds, and the command."""

import io
import json
import os
import re
import struct

import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from vitpyramid import create_model
from vitpyramid.data.augment import eval_crop
from vitpyramid.models.registry import get_variant
from vitpyramid.tools import predict as module
from vitpyramid.tools.classes import IMAGENET_CLASSES, categories_of, default_names
from vitpyramid.tools.predict import main, predict
from vitpyramid.tools.preprocess import evaluation_of, read_image
from vitpyramid.weights.store import write_weights

NAME = "pvt_micro"
VARIANT = get_variant(NAME)
APPLY = jax.jit(lambda model, variables, images: model.apply(variables, images), static_argnums=0)
PHOTO = Image.fromarray(skimage.data.chelsea()).resize((96, 64))
BROKEN = {
    "cut.jpg": "not a readable image",
    "empty.png": "(0 bytes)",
    "text.jpg": "(5 bytes)",
    "loop.png": "symbolic links",
}


@pytest.fixture(scope="module")
def network():
    model = create_model(NAME)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    kernel = jax.random.normal(jax.random.key(1), variables["params"]["head"]["kernel"].shape)
    variables["params"]["head"]["kernel"] = kernel / 16  # as initialised, all classes are nearly as probable
    return model, jax.tree.map(np.asarray, variables)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, {"name": NAME, "num_classes": 10, "image_size": 32}, network[1])
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    """A folder of five images, four of them in other folders."""
    folder = tmp_path / "photos"
    for name in ("b/deep", "c", "d"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(["b/deep/e.png", "c/f.JPG", "d/h.webp", "a.png", "d/g.bmp"]):
        PHOTO.rotate(40 * i).save(folder / name)
    return folder


def files_in(folder):
    return [folder / name for name in ["a.png", "b/deep/e.png", "c/f.JPG", "d/g.bmp", "d/h.webp"]]


def break_some(folder):
    (folder / "cut.jpg").write_bytes(encoded(PHOTO, "jpeg")[:1000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello")
    (folder / "loop.png").symlink_to(folder / "loop.png")


def encoded(image, *args, **options) -> bytes:
    image.save(stream := io.BytesIO(), *args, **options)
    return stream.getvalue()


def plain(network, path, size=32, crop=0.875):
    """Probabilities of the classes, in float64 after the network."""
    model, variables = network
    image = eval_crop(Image.open(path).convert("RGB"), size, crop)
    pixels = (np.asarray(image, np.float32) / 255 - VARIANT.mean) / VARIANT.std
    logits = np.asarray(APPLY(model, variables, pixels[None].astype(np.float32))[0], np.float64)
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_predictions_are_the_networks(network, photos):
    paths = files_in(photos)
    broken = photos / "nothing.png"
    compiled = module._probabilities._cache_size()
    found = list(predict(*network, VARIANT, [*paths[:2], broken, *paths[2:]], top=4, batch=4))
    assert module._probabilities._cache_size() == compiled + 1  # the last batch is not full
    assert [prediction.path for prediction in found] == [*paths[:2], broken, *paths[2:]]
    assert found.pop(2) == module.Prediction(broken, (), (), "No such file or directory")
    for prediction in found:
        expected = plain(network, prediction.path)
        assert prediction.classes == tuple(np.argsort(-expected)[:4].tolist())
        np.testing.assert_allclose(prediction.probabilities, np.sort(expected)[:-5:-1], rtol=1e-4)
    assert len({prediction.probabilities for prediction in found}) == 5


def test_all_classes_and_another_size(network, photos):
    (prediction,) = predict(*network, VARIANT, [photos / "a.png"], size=(64, 48), top=99)
    expected = plain(network, photos / "a.png", (64, 48))
    assert prediction.classes == tuple(np.argsort(-expected).tolist())
    np.testing.assert_allclose(prediction.probabilities, np.sort(expected)[::-1], rtol=1e-4)
    assert not list(predict(*network, VARIANT, []))


def seen(data: bytes, path) -> np.ndarray:
    """What the network sees of a file at about its own size."""
    path.write_bytes(data)
    return read_image(path, (56, 84), VARIANT)


def expected_of(image) -> np.ndarray:
    return np.asarray(eval_crop(image.convert("RGB"), (56, 84), VARIANT.crop))


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "webp" else {}
    data = encoded(PHOTO, kind, exif=exif, **lossless)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((64, 96) if orientation > 4 else (96, 64))
    np.testing.assert_array_equal(seen(data, tmp_path / "photo"), expected_of(upright))
    if orientation > 1:
        assert (expected_of(upright) != expected_of(PHOTO)).mean() > 0.9


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM", b"nonsense"])
def test_damaged_exif_is_ignored(exif, tmp_path):
    data = encoded(PHOTO, "jpeg", exif=exif)
    np.testing.assert_array_equal(seen(data, tmp_path / "a.jpg"), expected_of(Image.open(io.BytesIO(data))))


def test_photos_with_an_exif_tag_of_a_wrong_type_are_turned(tmp_path):
    entries = struct.pack("<HHII", 0x0103, 4, 1, 70000) + struct.pack("<HHII", 0x0112, 3, 1, 6)  # Compression: 16 bits
    data = encoded(PHOTO, "png", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4))
    upright = PHOTO.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(seen(data, tmp_path / "a.png"), expected_of(upright))


def test_kinds_of_pixels(tmp_path):
    grey = PHOTO.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    with_alpha = PHOTO.copy()
    with_alpha.putalpha(grey)
    palette = PHOTO.quantize(64)
    clear = encoded(palette, "png", transparency=3)
    expected = {
        "grey.png": (encoded(grey, "png"), grey),
        "16 bits.png": (encoded(wide, "png"), grey),
        "16 bits.tif": (encoded(wide, "tiff"), grey),
        "alpha.png": (encoded(with_alpha, "png"), PHOTO),
        "grey alpha.png": (encoded(with_alpha.convert("LA"), "png"), grey),
        "palette.gif": (encoded(palette, "gif"), palette),
        "clear.png": (clear, palette),
        "bits.png": (encoded(PHOTO.convert("1"), "png"), PHOTO.convert("1")),
        "cmyk.tif": (encoded(PHOTO.convert("CMYK"), "tiff"), PHOTO.convert("CMYK")),
    }
    for name, (data, image) in expected.items():
        np.testing.assert_array_equal(seen(data, tmp_path / name), expected_of(image), err_msg=name)
    cmyk = encoded(PHOTO.convert("CMYK"), "jpeg")
    assert np.abs(seen(cmyk, tmp_path / "cmyk.jpg") - expected_of(PHOTO).astype(float)).mean() < 5
    assert seen(encoded(PHOTO.resize((1, 300)), "png"), tmp_path / "thin.png").shape == (56, 84, 3)


def test_unreadable_images(tmp_path, monkeypatch):
    break_some(tmp_path)
    for name, reason in {**BROKEN, "nothing.png": "No such file"}.items():
        problem = read_image(tmp_path / name, (32, 32), VARIANT)
        assert isinstance(problem, str)
        assert "\n" not in problem
        assert reason in problem
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("jpeg", "png"):
        (tmp_path / "large").write_bytes(encoded(PHOTO, kind))
        assert "exceeds limit" in read_image(tmp_path / "large", (32, 32), VARIANT)


def command(capsys, *args) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def walk_backwards(top, onerror, walk=os.walk):
    """File systems list in any order; this one is surely not sorted."""
    for folder, folders, files in walk(top, onerror=onerror):
        folders.sort(reverse=True)
        yield folder, folders, sorted(files, reverse=True)


def test_command_on_a_folder(network, weights, photos, monkeypatch, capsys):
    monkeypatch.setattr(os, "walk", walk_backwards)
    shapes, compiled = [], module._probabilities
    monkeypatch.setattr(module, "_probabilities", lambda *args: [shapes.append(args[3].shape), compiled(*args)][1])
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / ".thumbnails").mkdir()
    PHOTO.save(photos / ".thumbnails" / "a.png")
    code, out, err = command(capsys, photos, f"--checkpoint={weights}", "--json", "--top=3", "--batch=4")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in files_in(photos)]
    for line in lines:
        expected = plain(network, line["path"])
        assert [found["class"] for found in line["top"]] == np.argsort(-expected)[:3].tolist()
        assert [found["name"] for found in line["top"]] == [f"class {k}" for k in np.argsort(-expected)[:3]]
        np.testing.assert_allclose(
            [found["probability"] for found in line["top"]], np.sort(expected)[:-4:-1], rtol=1e-4
        )
    assert "pvt_micro, 10 classes, images of 32 x 32, crop 0.875, bicubic" in err
    assert "5/5" in err  # the bar
    assert shapes == [(4, 32, 32, 3)] * 2


def test_command_prints_text(network, weights, photos, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(f"  Möwe {i}" for i in range(10)) + "\n\n", "utf-8")
    path = photos / "a.png"
    args = (path, f"--checkpoint={weights}", f"--classes={tmp_path / 'names.txt'}", f"--model={NAME}")
    code, out, _ = command(capsys, *args)
    assert code == 0
    expected = plain(network, path)
    lines = [f"{expected[k]:8.2%}  Möwe {k}" for k in np.argsort(-expected)[:5]]
    assert out.splitlines() == [str(path), *lines]


def test_command_skips_what_is_broken(weights, photos, tmp_path, capsys):
    break_some(photos)
    (tmp_path / "nothing").mkdir()
    args = [photos, tmp_path / "nothing", tmp_path / "absent.jpg", f"--checkpoint={weights}", "--json", "--batch=4"]
    code, out, err = command(capsys, *args)
    assert code == 2
    assert [json.loads(line)["path"] for line in out.splitlines()] == [str(path) for path in files_in(photos)]
    skipped = re.findall(r"skipped (.*?): ", err)
    paths = [tmp_path / "nothing", *(photos / name for name in sorted(BROKEN)), tmp_path / "absent.jpg"]
    assert skipped == [str(path) for path in paths]
    assert command(capsys, photos / "a.png", tmp_path / "nothing", f"--checkpoint={weights}")[0] == 2
    assert command(capsys, photos / "text.jpg", f"--checkpoint={weights}")[:2] == (1, "")


def test_names_of_files_need_not_be_text(weights, photos, capsys):
    path = photos / "caf\udce9.png"  # Latin-1
    PHOTO.save(path)
    code, out, _ = command(capsys, path, f"--checkpoint={weights}")
    assert code == 0
    assert out.startswith(rf"{photos}/caf\udce9.png")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--top=0"], "'0': expected an integer of at least 1"),
        (["--batch=x"], "'x': expected an integer of at least 1"),
        (["--size=0"], "'0' is not a size"),
        (["--size=16"], "H and W at least 32"),
        (["--model=pit_micro"], "expected weights of pit_micro, these are of pvt_micro"),
        (["--classes=names.txt"], "names.txt: expected 10 lines, one for each class of the model, it has 2"),
        (["--classes=bytes.txt"], "bytes.txt: expected text in UTF-8"),
        (["--classes=absent.txt"], "absent.txt"),
        (["--checkpoint=absent.pth"], "absent.pth: no such file or folder"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_command_refuses(args, message, weights, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    (photos / "names.txt").write_text("a\nb\n")
    (photos / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    code, out, err = command(capsys, "a.png", f"--checkpoint={weights}", *args)
    assert (code, out) == (1, "")
    assert message in err


def test_without_images_no_weights_are_loaded(photos, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    code, out, err = command(capsys, tmp_path / "nothing", "--checkpoint=absent.pth")
    assert (code, out) == (1, "")
    assert err == f"skipped {tmp_path / 'nothing'}: no images in this folder\n"
    assert command(capsys, "--help")[0] == 0


def test_a_run_is_cut_as_it_was_evaluated(network, weights, photos, tmp_path, capsys):
    run = tmp_path / "run"
    write_weights(run, {"name": NAME, "num_classes": 10, "image_size": 32}, network[1])
    config = {"data": {"eval_crop": 1.0, "eval_interpolation": "bilinear"}}
    (run / "config.json").write_text(json.dumps(config))
    code, out, err = command(capsys, photos / "a.png", f"--checkpoint={run}", "--json", "--top=1")
    assert code == 0
    assert "crop 1, bilinear" in err
    image = eval_crop(Image.open(photos / "a.png"), 32, 1.0, Image.Resampling.BILINEAR)
    image.save(tmp_path / "cut.png")
    probability = plain(network, tmp_path / "cut.png", crop=1.0).max()
    assert json.loads(out)["top"][0]["probability"] == pytest.approx(probability, rel=1e-4)
    config["data"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (run / "config.json").write_text(json.dumps(config))
    found = evaluation_of(str(run), NAME)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    _, out, _ = command(capsys, photos / "a.png", f"--checkpoint={run}", "--json", "--top=1")
    assert json.loads(out)["top"][0]["probability"] != pytest.approx(probability, rel=1e-4)
    del config["data"]["eval_interpolation"]  # of a run before there was this key
    (run / "config.json").write_text(json.dumps(config))
    assert evaluation_of(str(run), NAME).interpolation == "bicubic"


def test_imagenet_classes():
    names = default_names(1000)
    assert names == IMAGENET_CLASSES.read_text("utf-8").splitlines()
    assert len(set(names)) == 1000
    known = {0: "tench", 134: "crane bird", 281: "tabby", 517: "crane", 951: "lemon", 999: "toilet tissue"}
    assert {k: names[k] for k in known} == known
    assert default_names(3) == ["class 0", "class 1", "class 2"]


def test_classes_of_coco():
    names = default_names(80, "retinanet_pvt_small")
    assert (names[0], names[11], names[79], len(set(names))) == ("person", "stop sign", "toothbrush", 80)
    categories = categories_of(names)
    assert list(categories.values()) == names
    # The ids that COCO's files do not have.
    assert set(range(1, 91)) - set(categories) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert default_names(80, "pvt_small")[0] == "class 0"
    assert categories_of(["cat", "dog"]) == categories_of(["cat", "dog"], {"about": {}}) == {1: "cat", 2: "dog"}
    assert categories_of(["cat", "dog"], {"about": {"category_ids": [7, 2]}}) == {7: "cat", 2: "dog"}
    by_id = categories_of(default_names(91, "detr_pvt_small"))
    assert {i: by_id[i] for i in categories} == categories and list(by_id) == list(range(91))
