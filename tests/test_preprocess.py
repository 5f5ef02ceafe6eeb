"""vitpyramid.preprocess, class_names and load_config: what a notebook calls."""

import io
import json
import zipfile
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from flax import traverse_util
from hatchling import build
from PIL import Image

import vitpyramid
from vitpyramid.data.augment import eval_crop
from vitpyramid.tasks import ConfigError
from vitpyramid.tools import predict
from vitpyramid.tools.classes import saved_names
from vitpyramid.weights import names, store

PHOTO = Image.fromarray(skimage.data.chelsea()).resize((96, 64))


def by_hand(image, size=32, crop=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    cut = np.asarray(eval_crop(image, size, crop), np.float64)
    return (cut / 255 - mean) / std


def test_images_of_every_kind_come_out_as_evaluation_sees_them(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    prepare = vitpyramid.preprocess("pvt_micro")
    expected = by_hand(PHOTO)
    pixels = np.asarray(PHOTO)
    alpha = np.concatenate([pixels, pixels[..., :1]], axis=-1)
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), PHOTO, pixels, alpha):
        found = prepare(image)
        assert (found.shape, found.dtype) == ((1, 32, 32, 3), np.float32)
        np.testing.assert_allclose(found[0], expected, atol=1e-6)
    for several in ([PHOTO, pixels], (tmp_path / "photo.png", PHOTO), np.stack([pixels, pixels])):
        np.testing.assert_allclose(prepare(several), [expected] * 2, atol=1e-6)
    grey = PHOTO.convert("L")
    for image in (grey, np.asarray(grey), np.asarray(grey)[..., None]):
        np.testing.assert_allclose(prepare(image)[0], by_hand(grey.convert("RGB")), atol=1e-6)
    wide = vitpyramid.preprocess("pvt_micro", size=(48, 64))(PHOTO)
    np.testing.assert_allclose(wide[0], by_hand(PHOTO, (48, 64)), atol=1e-6)


def test_photos_are_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(file := io.BytesIO(), "png", exif=exif)
    opened = Image.open(file)
    found = vitpyramid.preprocess("pvt_micro")(opened)
    np.testing.assert_allclose(found[0], by_hand(PHOTO.transpose(Image.Transpose.ROTATE_270)), atol=1e-6)
    assert opened.getexif()[0x0112] == 6  # the caller's image is as it was


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "an image of float32 and shape (8, 8, 3): expected"),
        (np.zeros((3, 8, 8), np.uint8), "an image of uint8 and shape (3, 8, 8): expected"),
        (np.zeros((8,), np.uint8), "shape (8,)"),
        (np.zeros((0, 8, 3), np.uint8), "shape (0, 8, 3)"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError) as error:
        vitpyramid.preprocess("pvt_micro")(image)
    assert message in str(error.value)


@pytest.fixture
def run(tmp_path):
    """A work directory as a run leaves it, of a network that has three classes."""
    flat = {path: np.zeros(shape, np.float32) for path, shape in names.model_shapes("deit_micro", 3, 48).items()}
    params = traverse_util.unflatten_dict(flat)["params"]
    state = {"step": np.int32(7), "params": params, "model_state": {}, "ema": {}}
    network = {"name": "deit_micro", "num_classes": 3, "image_size": 48, "scan": False}
    with store.open_checkpoints(tmp_path) as manager:
        store.save(manager, 7, state, {"network": network, "ema": False, "about": {"classes": ["cat", "dog", "Möwe"]}})
    evaluation = {"eval_crop": 0.5, "eval_interpolation": "bicubic", "mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]}
    (tmp_path / "config.json").write_text(json.dumps({"data": evaluation}))
    return tmp_path


def test_a_run_says_how_its_images_are_prepared_and_what_its_classes_are_called(run, tmp_path, capsys):
    found = vitpyramid.preprocess(run)(PHOTO)
    np.testing.assert_allclose(found[0], by_hand(PHOTO, 48, 0.5, (0.1, 0.2, 0.3), (1, 2, 4)), atol=1e-6)
    assert vitpyramid.class_names(run) == ["cat", "dog", "Möwe"]
    PHOTO.save(tmp_path / "photo.png")
    assert predict.main([str(tmp_path / "photo.png"), f"--checkpoint={run}", "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert [found["name"] for found in top] == ["cat", "dog", "Möwe"]  # all as probable


def test_names_of_classes():
    assert vitpyramid.class_names("pvt_small")[951] == "lemon"
    assert vitpyramid.class_names("pit_micro")[-1] == "class 9"
    synsets = [f"n{i:08d}" for i in range(1000)]
    assert saved_names({"about": {"classes": synsets}})[951] == "lemon"
    assert saved_names({"about": {"classes": synsets[:10]}}) == synsets[:10]
    for name in ("pvt_smal", "runs/nothing"):
        with pytest.raises(ValueError, match=rf"unknown model '{name}'; .*or a folder with a complete checkpoint"):
            vitpyramid.class_names(name)
    with pytest.raises(ValueError, match="such as pvt_small, .*or a folder with a complete checkpoint"):
        vitpyramid.preprocess("pvt-smal")


OWN = """
from vitpyramid.configs import quickstart

def get_config(text="pvt"):
    config = quickstart.get_config(text)
    config.epochs = 3.0
    return config
"""


def test_configs_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart.py:rest", "quickstart:rest", "configs/quickstart.py:rest"):
        assert vitpyramid.load_config(name).model.name == "rest_micro"
    (tmp_path / "mine.py").write_text(OWN)
    config = vitpyramid.load_config("mine.py")
    assert (config.model.name, config.epochs) == ("pvt_micro", 3.0)
    assert vitpyramid.load_config(tmp_path / "mine.py").to_dict() == config.to_dict()
    assert vitpyramid.load_config("mine.py:pit").model.name == "pit_micro"
    with pytest.raises(AttributeError, match="epoch"):
        config.epoch = 4.0
    (tmp_path / "empty.py").write_text("")
    for name, message in (("nothing.py", "no such file; with the package come deit.py"), ("empty.py", "get_config")):
        with pytest.raises(ConfigError, match=f"config .*{name}.*: .*{message}"):
            vitpyramid.load_config(name)
    with pytest.raises(ConfigError, match="the config cannot be run:\n  batch_size = -8"):
        config.batch_size = -8
        vitpyramid.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_wheel_has_the_configs_and_the_command(tmp_path, monkeypatch):
    """Unpacked elsewhere, the package finds its configs inside of itself."""
    monkeypatch.chdir(Path(vitpyramid.__file__).parents[1])
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / "site")
    (entry,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "vitpyramid = vitpyramid.cli:command" in entry.read_text()
    shipped = {path.name for path in Path("configs").glob("*.py")}
    assert {path.name for path in (tmp_path / "site/vitpyramid/configs").iterdir()} == shipped
    spec = PathFinder.find_spec("configs", [str(tmp_path / "site/vitpyramid")])  # the module, or the folder beside it?
    spec.loader.exec_module(module := module_from_spec(spec))
    assert module.__path__ == [str(tmp_path / "site/vitpyramid/configs")]
