"""vitpyramid.data.scenes, label_maps and boxes: what other kinds of sources give."""

import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pycocotools import mask as coco_mask

import fake_gcs
from dense_streams import dense_config, write_coco
from streams import encoded
from vitpyramid.data import augment
from vitpyramid.data.annotated import open_annotated
from vitpyramid.data.annotations import label_map_of
from vitpyramid.data.scenes import CATEGORIES, SIZES


def opened(name, split, task, training=False, **keys):
    config = dense_config(**{"data.name": name, "data.max_boxes": 3, **keys})
    return open_annotated(config.data, split, task, training)


# Scenes


def test_a_scene_is_a_function_of_split_and_number():
    scenes, again, part = (opened("scenes", split, "detect") for split in ("train", "train", "train[100:]"))
    assert len(scenes) == SIZES["train"] and scenes.categories == CATEGORIES and scenes.category_ids[0] == 1
    assert scenes[100].image == again[100].image == part[0].image and part.ids[0] == 100
    assert pickle.loads(pickle.dumps(scenes))[100].image == part[0].image  # as data workers get it
    assert scenes[0].image != opened("scenes", "test", "detect")[0].image


def test_boxes_masks_and_label_maps_of_scenes_agree():
    detect, segment = opened("scenes", "test", "detect"), opened("scenes", "test", "segment")
    assert segment.categories == ("ground", *CATEGORIES)
    sizes, overlaps, counts = detect.sizes(), 0, []
    for index in range(20):
        example, image = detect[index], np.asarray(augment.decode(detect[index].image))
        assert example.size == image.shape[:2] == tuple(sizes[index]) and example.image == segment[index].image
        masks = np.array([coco_mask.decode(mask) for mask in example.masks])
        assert masks.sum(axis=0).max() == 1  # later digits hide earlier ones
        labels = np.zeros(image.shape[:2], np.uint8)
        for mask, label, (x1, y1, x2, y2) in zip(masks, example.labels, example.boxes.astype(int), strict=True):
            y, x = np.nonzero(mask)
            assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (x1, y1, x2, y2)
            labels[mask > 0] = label + 1
        np.testing.assert_array_equal(label_map_of(segment[index], 11), labels)
        x1, y1, x2, y2 = example.boxes.T[:, :, None]
        wide, high = np.minimum(x2, x2.T) - np.maximum(x1, x1.T), np.minimum(y2, y2.T) - np.maximum(y1, y1.T)
        overlaps += ((wide > 0) & (high > 0)).sum() - len(masks)
        counts.append(len(masks))
    assert overlaps > 5 and min(counts) == 1 and max(counts) == 3
    truth = opened("scenes", "test[:20]", "detect").ground_truth()
    assert len(truth["annotations"]) == sum(counts) and truth["annotations"][0]["area"] > 20
    assert opened("scenes", "test[3:5]", "detect").ground_truth()["images"] == truth["images"][3:5]


def test_no_digit_of_the_training_scenes_is_in_others():
    digits = [opened("scenes", split, "detect").records.digits for split in ("train", "test")]
    assert [len(part) for part in digits] == [1437, 360]
    with pytest.raises(ValueError, match="'train\\+test': expected scenes of one split"):
        opened("scenes", "train+test", "detect")
    with pytest.raises(ValueError, match="data.max_boxes: 2: expected 3 or more"):
        opened("scenes", "train", "detect", True, **{"data.max_boxes": 2})


# Folders of label maps


def write_label_maps(folder, maps):
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
    for number, levels in enumerate(maps):
        Image.fromarray(np.full((*levels.shape, 3), number, np.uint8)).save(folder / f"images/training/{number}.jpg")
        Image.fromarray(levels).save(folder / f"annotations/training/{number}.png")


LEVELS = np.array([[0, 1, 2], [150, 150, 0]], np.uint8)


def test_ade20k(tmp_path):
    write_label_maps(tmp_path, [LEVELS, LEVELS.T])
    source = opened("ade20k", "training", "segment", **{"data.data_dir": str(tmp_path)})
    assert len(source.categories) == 150 and source.category_ids[0] == 1 and source.ids == ["0", "1"]
    assert label_map_of(source[0], 150).tolist() == [[255, 0, 1], [149, 149, 255]]
    np.testing.assert_array_equal(source.sizes(), [[2, 3], [3, 2]])
    with pytest.raises(ValueError, match="class 149, expected fewer than 149"):
        label_map_of(source[0], 149)
    rows = "".join(f"{n}\t0.1\t1\t1\t1\t{name}\n" for n, name in enumerate(["wall", "building, edifice"] * 75))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    source = opened("ade20k", "training[1:]", "segment", **{"data.data_dir": str(tmp_path)})
    assert source.categories[:2] == ("wall", "building") and source.ids == ["1"]


def test_label_maps_of_ones_own(tmp_path, caplog):
    write_label_maps(tmp_path, [LEVELS % 4, LEVELS % 4])
    keys = {"data.data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="classes.txt: expected the names of the classes"):
        opened("label_maps", "training", "segment", **keys)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    source = opened("label_maps", "training", "segment", **keys)
    assert source.categories == ("sky", "sea", "land") and source.category_ids == (0, 1, 2)
    np.testing.assert_array_equal(label_map_of(source[0], 3), LEVELS % 4)
    palette = Image.fromarray(LEVELS % 4, "P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "annotations/training/1.png")
    np.testing.assert_array_equal(label_map_of(source[1], 3), LEVELS % 4)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "annotations/training/1.png")
    with pytest.raises(ValueError, match="a label map of mode RGB"):
        label_map_of(source[1], 3)
    (tmp_path / "annotations/training/1.png").rename(tmp_path / "annotations/training/2.png")
    with pytest.raises(ValueError, match=r"1 of 2 images have no label map, such as '1.png'"):
        opened("label_maps", "training", "segment", **keys)
    assert opened("label_maps", "training", "segment", **keys, **{"data.on_corrupt": "skip"}).ids == ["0"]
    assert "1 images without a label map; left out: 1.jpg" in caplog.text
    assert "1 label maps without an image; left out: 2.png" in caplog.text
    with pytest.raises(ValueError, match="available: 'training'"):
        opened("label_maps", "test", "segment", **keys)


def test_annotated_data_in_a_bucket(tmp_path, monkeypatch):
    write_label_maps(tmp_path / "ade", [LEVELS])
    write_coco(tmp_path / "coco", [{}, {"image_id": 11}])
    with fake_gcs.serve() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        for path in tmp_path.rglob("*.*"):
            bucket.put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
        source = opened("coco", "val", "detect", True, **{"data.data_dir": "gs://bucket/coco", "data.masks": False})
        assert source.ids == [10, 11] and source.where(1) == "gs://bucket/coco/val/11.png"
        assert source[0].image == (tmp_path / "coco/val/10.png").read_bytes()
        source = opened("ade20k", "training", "segment", **{"data.data_dir": "gs://bucket/ade"})
        assert source.sizes().tolist() == [[2, 3]] and label_map_of(source[0], 150)[0].tolist() == [255, 0, 1]


# TFDS


class Pets(tfds.core.GeneratorBasedBuilder):
    """Features as those of coco/2017."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features
        entry = {"area": np.int64, "bbox": features.BBoxFeature(), "id": np.int64, "is_crowd": np.bool_}
        entry["label"] = features.ClassLabel(names=["cat", "dog"])
        image = {
            "image": features.Image(encoding_format="png"),
            "image/id": np.int64,
            "image/filename": features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=features.FeaturesDict(image | {"objects": features.Sequence(entry)})
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        boxes = [[(0.25, 0.1, 0.75, 0.5, 0), (0.0, 0.0, 1.0, 1.0, 1)], [], [(0.5, 0.5, 0.5, 0.9, 0)]]
        for number, (size, found) in enumerate(zip(((40, 60), (60, 40), (33, 50)), boxes, strict=True)):
            objects = [
                {
                    "area": int((ymax - ymin) * (xmax - xmin) * 2400),
                    "bbox": tfds.features.BBox(ymin, xmin, ymax, xmax),
                    "id": 1,
                    "is_crowd": bool(label),
                    "label": label,
                }
                for ymin, xmin, ymax, xmax, label in found
            ]
            image = encoded(Image.fromarray(np.full((*size, 3), number, np.uint8)))
            yield number, {"image": image, "image/id": 500 + number, "image/filename": "x.png", "objects": objects}


def test_boxes_of_a_prepared_data_set(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    Pets(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    keys = {"data.data_dir": str(tmp_path)}
    source = opened("pets", "validation", "detect", **keys)
    index = source.ids.index(500)
    assert sorted(source.ids) == [500, 501, 502] and source.categories == ("cat", "dog")
    example = source[index]
    np.testing.assert_allclose(example.boxes, [[6, 10, 30, 30], [0, 0, 60, 40]], rtol=1e-6)
    assert example.labels.tolist() == [0, 1] and example.crowd.tolist() == [False, True]
    assert np.asarray(augment.decode(example.image)).shape[:2] == example.size == tuple(source.sizes()[index])
    truth = source.ground_truth()
    assert [entry["id"] for entry in truth["images"]] == source.ids and len(truth["annotations"]) == 3
    first = next(entry for entry in truth["annotations"] if entry["image_id"] == 500)
    np.testing.assert_allclose(first.pop("bbox"), [6, 10, 24, 20], rtol=1e-6)
    assert first["area"] == 480 and first["category_id"] == 1 and first["iscrowd"] == 0
    # The second opening reads what the first one kept.
    monkeypatch.setattr("vitpyramid.data.boxes._row", None)
    trained = opened("pets", "validation", "detect", True, **keys, **{"data.masks": False})
    assert sorted(trained.ids) == [500, 502] and len(trained[trained.ids.index(502)].boxes) == 0
    assert "1 boxes outside of their image, or without area; left out: image 502" in caplog.text
    assert "1 images without annotations; not learned: image 501" in caplog.text
    with pytest.raises(ValueError, match="data.masks = True: 'pets' has no masks"):
        opened("pets", "validation", "detect", True, **keys)


def test_a_prepared_data_set_without_boxes(data_dir):
    with pytest.raises(
        ValueError, match="data.name: 'digits' has no boxes: expected the features 'image' and 'objects'"
    ):
        opened("digits", "train", "detect", **{"data.data_dir": data_dir})
