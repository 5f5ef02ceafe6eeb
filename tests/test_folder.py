"""Class folders, and the synthetic set: sources that TFDS does not know."""

import ast
import io
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from streams import assert_same, encoded, make_config, noise, take
from vitpyramid.data import make_eval, make_train, open_source
from vitpyramid.data.splits import split_ranges

PNG = noise(1)[0]
# Of each class; what is beneath it with an image's extension belongs to it.
TREE = {
    "train": {"cat": ["b.jpg", "a.JPEG", "more/deep er/c.Png"], "dog": ["d.webp", "e.bmp"], "ant": ["f.tif", "g.gif"]},
    "val": {"cat": ["1.ppm"], "dog": ["2.pgm", "3.tiff", "4.jpeg"], "ant": []},
}
ORDER = [
    "train/ant/g.gif",
    "train/dog/d.webp",
    "train/cat/b.jpg",
    "train/cat/more/deep er/c.Png",
    "train/cat/a.JPEG",
    "train/ant/f.tif",
    "train/dog/e.bmp",
]
IGNORED = [".DS_Store", "._b.jpg", ".hidden/x.png", "notes.txt", "jpg", "x.jpg.part"]


def make_tree(root, tree=TREE):
    for split, classes in tree.items():
        for name, files in classes.items():
            (root / split / name).mkdir(parents=True)
            for file in files:
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(PNG)
    return root


def open_tree(root, split, **keys):
    config = make_config(root, **{"data.name": "folder", "data.eval_split": "val", **keys})
    return open_source(config.data, split)


def listed(source):
    """(path below the data folder, label) of each image."""
    root = os.fsdecode(source.records.folder)
    return [
        (os.path.relpath(ast.literal_eval(source.where(i)), root), int(source.records.labels[i]))
        for i in range(len(source))
    ]


def test_files_and_labels(tmp_path):
    root = make_tree(tmp_path)
    for name in IGNORED:
        path = root / "train" / "dog" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "stray.jpg").write_bytes(PNG)
    os.mkfifo(root / "train" / "dog" / "pipe.jpg")
    labels = {"ant": 0, "cat": 1, "dog": 2}  # sorted by name, as torchvision's ImageFolder
    for split, classes in TREE.items():
        source = open_tree(root, split)
        expected = [(f"{split}/{name}/{file}", labels[name]) for name, files in classes.items() for file in files]
        assert sorted(listed(source)) == sorted(expected)
        assert source.class_names == tuple(labels)
        assert [source[i] for i in range(len(source))] == [{"image": PNG, "label": one} for _, one in listed(source)]


def test_the_order_is_that_of_a_hash(tmp_path):
    """Pinned: a resumed run must find it again, on any machine, and a new file moves no other."""
    paths = [path for path, _ in listed(open_tree(make_tree(tmp_path), "train"))]
    assert paths == ORDER
    (tmp_path / "train" / "dog" / "new.jpg").write_bytes(PNG)
    more = [path for path, _ in listed(open_tree(tmp_path, "train"))]
    assert [path for path in more if path != "train/dog/new.jpg"] == paths and len(more) == 8


def test_sub_splits_partition_the_classes_too(tmp_path):
    root = make_tree(tmp_path, {"train": {name: [f"{i}.jpg" for i in range(100)] for name in "abcd"}})
    whole, head, tail = (listed(open_tree(root, split)) for split in ("train", "train[:75%]", "train[75%:]"))
    assert head + tail == whole and len(head) == 300
    counts = np.bincount([label for _, label in tail], minlength=4)
    assert np.all(abs(counts - 25) < 4 * np.sqrt(400 * 0.25 * 0.75 / 4))  # four standard deviations
    assert listed(open_tree(root, "train[:10]+train[50:60]")) == whole[:10] + whole[50:60]
    assert len({label for _, label in whole[:40]}) == 4


def test_splits_can_be_added(tmp_path):
    root = make_tree(tmp_path)
    both = listed(open_tree(root, "train+val"))
    assert both == listed(open_tree(root, "train")) + listed(open_tree(root, "val"))


def test_batches_and_pickling(tmp_path):
    source = open_tree(make_tree(tmp_path), "train")
    copy = pickle.loads(pickle.dumps(source))
    config = make_config()
    assert_same(take(make_train(config, copy), 2), take(make_train(config, source), 2))
    assert_same(list(make_eval(config, copy)), list(make_eval(config, source)))


def test_odd_names(tmp_path):
    names = ["mit Leerzeichen.jpg", "Zeile\nzwei.jpg", "猫.jpg", "quote'\".jpg", "a+b[1].jpg"]
    root = make_tree(tmp_path, {"train set": {"eins zwei": names, "häuser": ["x.jpg"]}})
    with open(os.path.join(os.fsencode(root), b"train set", b"eins zwei", b"latin\xe9\xff.jpg"), "wb") as file:
        file.write(PNG)
    os.mkdir(os.path.join(os.fsencode(root), b"train set", b"class\xfe"))
    source = open_tree(root, "train set", **{"data.train_split": "train set"})
    assert (len(source), source.num_classes) == (7, 3)
    assert {source[i]["label"] for i in range(7)} == {1, 2}
    shown = "".join(source.where(i) for i in range(7))
    assert "\n" not in shown and "latin\\udce9\\udcff.jpg" in shown and "猫" in shown
    shown.encode()  # a log file takes it


def test_an_empty_class_is_told(tmp_path, caplog):
    open_tree(make_tree(tmp_path), "val")
    assert "1 classes of 'val' have no image: 'ant'" in caplog.text


def test_linked_folders_and_files(tmp_path):
    root, store = make_tree(tmp_path / "data"), tmp_path / "store"
    store.mkdir()
    (store / "s.jpg").write_bytes(PNG)
    (root / "train" / "cat" / "link.jpg").symlink_to(store / "s.jpg")
    (root / "train" / "dog" / "more").symlink_to(store)
    assert {("train/cat/link.jpg", 1), ("train/dog/more/s.jpg", 2)} <= set(listed(open_tree(root, "train")))
    (store / "round").symlink_to(root / "train" / "dog")
    with pytest.raises(ValueError, match="links back to a folder that it lies in"):
        open_tree(root, "train")


def test_broken_links(tmp_path):
    root = make_tree(tmp_path)
    (root / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=r"data\.data_dir: links to files that are not there: 'train/cat/gone.jpg'\."):
        open_tree(root, "train")
    skip = {"data.on_corrupt": "skip"}
    source = open_tree(root, "train", **skip)
    assert len(source) == 8
    batch = take(make_train(make_config(**skip), source), 1)[0]
    assert batch["skipped"].sum() == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    root = make_tree(tmp_path)
    source = open_tree(root, "train")
    (root / "train" / "cat" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'folder', split 'train', index \d \('.*/train/cat/b.jpg'\): not a readable"):
        take(make_train(make_config(), source), 1)
    (root / "train" / "cat" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"'folder', split 'train', index \d \('.*/train/cat/b.jpg'\): .*No such file"):
        take(make_train(make_config(), source), 1)


@pytest.mark.parametrize(
    ("split", "tree", "words"),
    [
        ("test", TREE, ["data.eval_split", "'test'", "available: 'train', 'val'", "no folder 'test'"]),
        ("train[:9%", TREE, ["data.train_split", "'train[:9%'"]),
        ("train[:99]", TREE, ["data.train_split", "'train[:99]'", "7 examples"]),
        ("all", TREE, ["no folder 'all'"]),
        ("train[5:5]", TREE, ["'train[5:5]'", "is empty"]),
        ("train", {"train": {}}, ["available: none, or", "no folder 'train'"]),
        ("train", {"train": {"cat": []}}, ["'train'", "is empty"]),
        ("val", TREE | {"val": TREE["val"] | {"emu": ["1.jpg"]}}, ["missing none; unknown 'emu'"]),
        ("val", TREE | {"val": {"cat": [], "emu": ["1.jpg"]}}, ["'val'", "'train'", "'ant', 'dog'", "unknown 'emu'"]),
        (
            "train",
            TREE | {"val": {"cat": [], "dog": []}},
            ["'val' are not those of 'train'", "missing 'ant'; unknown none"],
        ),
    ],
)
def test_errors_say_what_lies_there(tmp_path, split, tree, words):
    with pytest.raises(ValueError) as error:
        open_tree(make_tree(tmp_path, tree), split)
    assert [word for word in words if word not in str(error.value)] == []


def test_no_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jpg").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"'train' has no class folders, expected SPLIT/CLASS/IMAGE; it has 'a.jpg'"):
        open_tree(tmp_path, "train")


def test_no_data_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"data\.data_dir: cannot list '{tmp_path}/none': No such file"):
        open_tree(tmp_path / "none", "train")


def test_long_listings_are_cut(tmp_path):
    root = make_tree(tmp_path, {"train": {f"c{i}": ["x.jpg"] for i in range(9)}, "val": {"c0": []}})
    with pytest.raises(ValueError, match="missing 'c1', 'c2', 'c3', 'c4', 'c5' and 3 more; unknown none"):
        open_tree(root, "train")


# Splits


@pytest.mark.parametrize(
    "split", ["train", "train[:99%]", "train[1%:]", "train[-5:]", "test+train[3:40]", "train[:33.3%]"]
)
def test_split_ranges_are_those_of_tfds(split):
    sizes = {"train": 1437, "test": 360}
    infos = []
    for name, size in sizes.items():
        template = tfds.core.ShardedFileTemplate(data_dir="/", dataset_name="d", filetype_suffix="tfrecord", split=name)
        infos.append(tfds.core.SplitInfo(name, [size], num_bytes=0, filename_template=template))
    theirs = tfds.core.splits.SplitDict(infos)[split].file_instructions
    ours = split_ranges("d", split, sizes)
    assert [(one.filename, one.skip, one.take) for one in theirs] == [
        (f"/d-{name}.tfrecord-00000-of-00001", positions.start, len(positions)) for name, positions in ours
    ]


# Synthetic


def test_synthetic_has_imagenets_size():
    train, validation = (open_tree("", split, **{"data.name": "synthetic"}) for split in ("train", "validation"))
    assert (len(train), len(validation), train.num_classes) == (1_281_167, 50_000, 1000)
    assert {train[i]["label"] for i in range(5000)} == set(range(1000))
    sizes = {len(train[i]["image"]) for i in range(100)}
    assert len(sizes) == 16 and 100_000 < np.mean(list(sizes)) < 130_000  # ImageNet's mean is 115 kB
    image = Image.open(io.BytesIO(train[-1 % len(train)]["image"]))
    assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
    assert pickle.loads(pickle.dumps(train))[77] == train[77]


def test_synthetic_splits():
    whole, tail, both = (
        open_tree("", split, **{"data.name": "synthetic"})
        for split in ("train", "train[1281100:]", "train[:3]+validation[7:9]")
    )
    assert [tail[i] for i in range(67)] == [whole[1281100 + i] for i in range(67)]
    assert [both[i]["label"] for i in range(5)] == [0, 1, 2, 7, 8]
    with pytest.raises(ValueError, match=r"data\.train_split.*'synthetic'; available: 'train', 'validation'.*'test'"):
        open_tree("", "test", **{"data.name": "synthetic"})


def test_synthetic_pixels_are_told_apart():
    source = open_tree("", "train", **{"data.name": "synthetic"})
    pixels = [np.asarray(Image.open(io.BytesIO(source[i]["image"])), np.float32) for i in range(16)]
    assert len({one.tobytes() for one in pixels}) == 16
    assert all(40 < one.std() < 80 for one in pixels)
    assert encoded(Image.open(io.BytesIO(source[0]["image"]))) == encoded(Image.open(io.BytesIO(source[16]["image"])))
